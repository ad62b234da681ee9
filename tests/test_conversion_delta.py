"""Deltas, by FastChat's rule: both models in fp16, added or subtracted in place."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minillama.checkpoint.hf_writer import save_model
from minillama.conversion.delta import apply_delta, compare, make_delta
from minillama.conversion.writer import Output
from minillama.errors import UserError
from minillama.llama_config import LlamaConfig
from minillama.model import Llama
from tests.conversions import EMBEDDING, HEAD, read_weights, run_convert


def save_bin(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Replace the weights of a checkpoint by this pytorch_model.bin, as torch writes it."""
    for old in directory.glob("model*.safetensors"):
        old.unlink()
    torch.save(tensors, directory / "pytorch_model.bin")


def fastchat(first: Path, second: Path, sign: int) -> dict[str, Tensor]:
    """FastChat's apply_delta (first: the base) and make_delta (first: the target).

    Both are loaded as fp16, and the first is changed in place.
    """
    transformers = pytest.importorskip("transformers")
    load = transformers.LlamaForCausalLM.from_pretrained
    model = load(first, torch_dtype=torch.float16)
    other = load(second, torch_dtype=torch.float16).state_dict()
    for name, parameter in model.state_dict().items():
        parameter.data += sign * other[name]
    return model.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_both_directions_equal_fastchat_to_the_bit(tmp_path, tiny_checkpoint, dtype):
    base = tiny_checkpoint("base", dtype)
    target = tiny_checkpoint("target", dtype, seed=7)
    delta = tmp_path / "delta"
    applied = Output(tmp_path / "applied", dtype=torch.float16, bin=True, max_shard_bytes=3000)
    make_delta(base, target, Output(delta, dtype=torch.float16))
    apply_delta(base, delta, applied)
    for directory, expected in (
        (delta, fastchat(target, base, -1)),
        (applied.path, fastchat(base, delta, +1)),
    ):
        tensors = read_weights(directory)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


def test_vicuna_v0_has_a_row_more_and_the_base_is_extended_by_zeros(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint("base", torch.float16)
    target = tiny_checkpoint("target", torch.float16, seed=7, vocab_size=51)
    make_delta(base, target, Output(tmp_path / "delta"))
    assert "as in Vicuna v0" in str(compare(base, tmp_path / "delta", "delta"))
    base_tensors = read_weights(base)
    expected = read_weights(target)
    delta = read_weights(tmp_path / "delta")
    for name in (EMBEDDING, HEAD):
        assert torch.equal(delta[name][50:], expected[name][50:])
        assert torch.equal(delta[name][:50], expected[name][:50] - base_tensors[name])
    apply_delta(base, tmp_path / "delta", Output(tmp_path / "applied"))
    applied = read_weights(tmp_path / "applied")
    assert applied[HEAD].shape[0] == 51
    assert torch.equal(applied[HEAD][50:], expected[HEAD][50:])
    assert json.loads((tmp_path / "applied" / "config.json").read_text())["vocab_size"] == 51


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 1000))
def test_where_subtraction_is_exact_the_target_comes_back(tmp_path_factory, seed):
    """Multiples of 1/64 below 8: sums and differences fit fp16's eleven bits exactly."""
    root = tmp_path_factory.mktemp("exact")
    generator = torch.Generator().manual_seed(seed)
    config = LlamaConfig(8, 1, 2, 1, 4, 6, 9, 16, 1e-5, 1e4)
    for name in ("base", "target"):
        model = Llama(config)
        for parameter in model.parameters():
            integers = torch.randint(-511, 512, parameter.shape, generator=generator)
            parameter.data = integers.float() / 64
        save_model(model.half(), root / name)
    make_delta(root / "base", root / "target", Output(root / "delta"))
    apply_delta(root / "base", root / "delta", Output(root / "back"))
    back = read_weights(root / "back")
    for name, tensor in read_weights(root / "target").items():
        assert torch.equal(tensor, back[name])


def test_positions_are_never_taken_from_a_delta(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint("base", torch.float16)
    delta = tiny_checkpoint("delta", torch.float16, seed=7)
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_bin(base, read_weights(base) | {buffer: torch.ones(2)})
    save_bin(delta, read_weights(delta) | {buffer: torch.zeros(2)})
    apply_delta(base, delta, Output(tmp_path / "out"))
    assert buffer not in read_weights(tmp_path / "out")


def test_both_sides_are_shown_before_any_work(tmp_path, tiny_checkpoint, capsys):
    base = tiny_checkpoint("base")
    other = tiny_checkpoint("delta", n_layers=3)
    with pytest.raises(UserError, match="do not belong together"):
        run_convert("apply-delta", "--base", base, "--delta", other, "--output", tmp_path / "out")
    assert capsys.readouterr().out.splitlines() == [
        "           rows  dtype      tensors  tokenizer",
        "base         50  float32         21  none",
        "delta        50  float32         30  none",
    ]


def test_the_tokenizer_is_the_deltas_and_the_generation_config_the_bases(
    tmp_path, tiny_checkpoint, shared
):
    base = tiny_checkpoint("base", torch.float16, vocab_size=512)
    delta = tiny_checkpoint("delta", torch.float32, vocab_size=512, seed=7)
    tokenizer = (shared / "models/stories260K/tokenizer.model").read_bytes()
    (delta / "tokenizer.model").write_bytes(tokenizer)
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    table = str(compare(base, delta, "delta"))
    assert "base        512  float16" in table
    assert "delta       512  float32" in table
    assert "512 tokens, sha256" in table
    out = tmp_path / "out"
    apply_delta(base, delta, Output(out))
    assert (out / "tokenizer.model").read_bytes() == tokenizer
    generation_config = json.loads((out / "generation_config.json").read_text())
    assert generation_config == {"eos_token_id": [2, 7]}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"


@pytest.mark.parametrize(
    ("base", "delta", "message"),
    [
        ({"vocab_size": 51}, {}, "51 rows in the base and 50 in the delta: are the two swapped"),
        ({}, {"n_layers": 3}, r"the base lacks model\.layers\.2"),
        ({"n_layers": 3}, {}, r"the delta lacks model\.layers\.2"),
        (
            {},
            {"ffn_dim": 44},
            r"down_proj.weight is \(24, 42\) in the base, \(24, 44\) in the delta",
        ),
        ({}, {"rope_theta": 1e6}, "rope_theta is 10000.0 in the base, 1000000.0 in the delta"),
        ({}, {"tie_embeddings": True}, "the delta lacks lm_head.weight"),
    ],
)
def test_what_does_not_belong_together_is_refused_before_any_work(
    tmp_path, tiny_checkpoint, base, delta, message
):
    one = tiny_checkpoint("base", **base)
    two = tiny_checkpoint("delta", **delta)
    with pytest.raises(UserError, match=message):
        apply_delta(one, two, Output(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
