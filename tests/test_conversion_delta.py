"""Chapter: deltas, by FastChat's rule: both models in fp16, added or subtracted in place."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import convert
from minillama.checkpoint.hf_format import open_weights, save_model
from minillama.conversion.delta import apply_delta, make_delta
from minillama.conversion.writer import Output
from minillama.errors import UserError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: entry.read() for name, entry in open_weights(directory).items()}


def save_bin(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the weights of a checkpoint by this pytorch_model.bin, as torch writes it."""
    for old in directory.glob("model*.safetensors"):
        old.unlink()
    torch.save(tensors, directory / "pytorch_model.bin")


def fastchat(first: Path, second: Path, sign: int) -> dict[str, torch.Tensor]:
    """FastChat's apply_delta (first the base) and make_delta (first the target): load both as fp16, change the first in place."""
    transformers = pytest.importorskip("transformers")
    one, two = (
        transformers.LlamaForCausalLM.from_pretrained(path, torch_dtype=torch.float16)
        for path in (first, second)
    )
    other = two.state_dict()
    for name, parameter in one.state_dict().items():
        parameter.data += sign * other[name]
    return one.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_both_directions_equal_fastchat_to_the_bit(tmp_path, tiny_checkpoint, dtype):
    base, target = tiny_checkpoint("base", dtype), tiny_checkpoint("target", dtype, seed=7)
    make_delta(base, target, Output(tmp_path / "delta", dtype=torch.float16))
    apply_delta(
        base,
        tmp_path / "delta",
        Output(tmp_path / "applied", dtype=torch.float16, bin=True, max_shard_bytes=3000),
    )
    for ours, theirs in (
        (weights(tmp_path / "delta"), fastchat(target, base, -1)),
        (weights(tmp_path / "applied"), fastchat(base, tmp_path / "delta", +1)),
    ):
        assert ours.keys() == theirs.keys() and all(
            torch.equal(ours[name], theirs[name]) for name in ours
        )


def test_vicuna_v0_has_a_row_more_and_the_base_is_extended_by_zeros(
    tmp_path, tiny_checkpoint, capsys
):
    base, target = (
        tiny_checkpoint("base", torch.float16),
        tiny_checkpoint("target", torch.float16, seed=7, vocab_size=51),
    )
    make_delta(base, target, Output(tmp_path / "delta"))
    assert "as in Vicuna v0" in capsys.readouterr().out
    delta, wanted, start = weights(tmp_path / "delta"), weights(target), weights(base)
    for name in (EMBEDDING, HEAD):
        assert torch.equal(delta[name][50:], wanted[name][50:]) and torch.equal(
            delta[name][:50], wanted[name][:50] - start[name]
        )
    apply_delta(base, tmp_path / "delta", Output(tmp_path / "applied"))
    applied = weights(tmp_path / "applied")
    assert applied[HEAD].shape[0] == 51 and torch.equal(applied[HEAD][50:], wanted[HEAD][50:])
    assert json.loads((tmp_path / "applied" / "config.json").read_text())["vocab_size"] == 51


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 1000))
def test_where_subtraction_is_exact_the_target_comes_back(tmp_path_factory, seed):
    """Multiples of 1/64 below 8: sums and differences fit fp16's eleven bits, so nothing is rounded."""
    from minillama.llama_config import LlamaConfig
    from minillama.model import Llama

    root, generator = tmp_path_factory.mktemp("exact"), torch.Generator().manual_seed(seed)
    config = LlamaConfig(8, 1, 2, 1, 4, 6, 9, 16, 1e-5, 1e4)
    for name in ("base", "target"):
        model = Llama(config)
        for parameter in model.parameters():
            parameter.data = (
                torch.randint(-511, 512, parameter.shape, generator=generator).float() / 64
            )
        save_model(model.half(), root / name)
    make_delta(root / "base", root / "target", Output(root / "delta"))
    apply_delta(root / "base", root / "delta", Output(root / "back"))
    assert all(
        torch.equal(tensor, weights(root / "back")[name])
        for name, tensor in weights(root / "target").items()
    )


def test_positions_are_never_taken_from_a_delta(tmp_path, tiny_checkpoint):
    base, delta = (
        tiny_checkpoint("base", torch.float16),
        tiny_checkpoint("delta", torch.float16, seed=7),
    )
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_bin(base, weights(base) | {buffer: torch.ones(2)})
    save_bin(delta, weights(delta) | {buffer: torch.zeros(2)})
    apply_delta(base, delta, Output(tmp_path / "out"))
    assert buffer not in weights(tmp_path / "out")


def test_both_sides_are_shown_and_the_files_beside_come_along(
    tmp_path, tiny_checkpoint, shared, capsys
):
    base = tiny_checkpoint("base", torch.float16, vocab_size=512)
    delta = tiny_checkpoint("delta", torch.float32, vocab_size=512, seed=7)
    tokenizer = shared / "models/stories260K/tokenizer.model"
    (delta / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    apply_delta(base, delta, Output(tmp_path / "out"))
    shown = capsys.readouterr().out
    assert (
        "base        512  float16" in shown
        and "delta       512  float32" in shown
        and "512 pieces, sha256" in shown
    )
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "eos_token_id": [2, 7]
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float16"


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
    one, two = tiny_checkpoint("base", **base), tiny_checkpoint("delta", **delta)
    with pytest.raises(UserError, match=message):
        convert.main(
            [
                "apply-delta",
                "--base",
                str(one),
                "--delta",
                str(two),
                "--output",
                str(tmp_path / "out"),
            ]
        )
    assert not (tmp_path / "out").exists()
