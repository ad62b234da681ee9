"""Meta's layout: the same network in another order, equal in its logits, and back to the bit."""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minillama.checkpoint.hf_writer import save_model
from minillama.conversion.meta import hf_to_meta, meta_to_hf
from minillama.conversion.meta_layout import (
    NUM_SHARDS,
    MetaParams,
    config_from_params,
    find_ffn_rule,
    to_halves,
    to_pairs,
)
from minillama.conversion.meta_reader import read_meta
from minillama.conversion.writer import Output
from minillama.hf_config import read_config
from minillama.llama_config import PUBLISHED, LlamaConfig, ffn_width
from minillama.model import Llama
from minillama.tokenizer import open_tokenizer
from tests.conftest import TINY
from tests.conversions import EMBEDDING, HEAD, random_meta, read_weights, save_meta


def test_permutation_by_hand():
    """One head of six rows: pairs (0,1) (2,3) (4,5) become halves 0,2,4 and 1,3,5."""
    rows = torch.arange(6.0).view(6, 1)
    assert to_halves(rows, heads=1).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    assert to_halves(rows.repeat(2, 1), heads=2).flatten().tolist() == [0, 2, 4, 1, 3, 5] * 2
    assert torch.equal(to_pairs(to_halves(rows, heads=1), heads=1), rows)


def meta_logits(w: dict[str, Tensor], tokens: Tensor, config: LlamaConfig = TINY) -> Tensor:
    """LLaMA as Meta computes it: a pair of neighbouring rows is one complex number, which is
    multiplied by exp(i · position · frequency)."""
    T = len(tokens)
    D = config.head_dim
    frequencies = config.rope_theta ** (-torch.arange(0, D, 2) / D)  # (D/2,)
    angles = torch.outer(torch.arange(T), frequencies)  # (T, D/2)
    rotation = torch.polar(torch.ones_like(angles), angles)[:, None]  # (T, 1, D/2)

    def norm(x: Tensor, name: str) -> Tensor:
        mean_square = x.square().mean(-1, keepdim=True)
        return x * torch.rsqrt(mean_square + config.norm_eps) * w[f"{name}.weight"]

    def rotate(x: Tensor) -> Tensor:
        pairs = x.reshape(*x.shape[:-1], D // 2, 2)  # (T, heads, D/2, 2)
        rotated = torch.view_as_complex(pairs) * rotation
        return torch.view_as_real(rotated).flatten(2)  # (T, heads, D)

    causal_mask = torch.full((T, T), -torch.inf).triu(1)
    group = config.n_heads // config.n_kv_heads
    x = w["tok_embeddings.weight"][tokens]  # (T, C)
    for i in range(config.n_layers):

        def linear(x: Tensor, name: str, layer: int = i) -> Tensor:
            return x @ w[f"layers.{layer}.{name}.weight"].T

        n = norm(x, f"layers.{i}.attention_norm")
        q = rotate(linear(n, "attention.wq").view(T, -1, D))  # (T, H, D)
        k = rotate(linear(n, "attention.wk").view(T, -1, D))  # (T, K, D)
        v = linear(n, "attention.wv").view(T, -1, D)  # (T, K, D)
        k = k.repeat_interleave(group, 1)  # (T, H, D)
        v = v.repeat_interleave(group, 1)  # (T, H, D)
        scores = torch.einsum("thd,shd->hts", q, k) / D**0.5 + causal_mask  # (H, T, T)
        y = torch.einsum("hts,shd->thd", scores.softmax(-1), v)  # (T, H, D)
        x = x + linear(y.reshape(T, -1), "attention.wo")
        n = norm(x, f"layers.{i}.ffn_norm")
        gate = torch.nn.functional.silu(linear(n, "feed_forward.w1"))
        x = x + linear(gate * linear(n, "feed_forward.w3"), "feed_forward.w2")
    return norm(x, "norm") @ w["output.weight"].T


def test_transformers_computes_on_the_converted_model_what_meta_computes_on_its_own(tmp_path):
    transformers = pytest.importorskip("transformers")
    source = random_meta()
    meta_to_hf(save_meta(tmp_path / "meta", [source]), Output(tmp_path / "hf"))
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.arange(17) * 7 % TINY.vocab_size
    logits = model(tokens[None]).logits[0]
    torch.testing.assert_close(logits, meta_logits(source, tokens), atol=1e-4, rtol=1e-4)


def test_transformers_own_converter_agrees(tmp_path):
    converter = pytest.importorskip(
        "transformers.models.llama.convert_llama_weights_to_hf",
        reason="this build of transformers comes without its Meta converter",
    )
    config = replace(TINY, ffn_dim=64)
    source = {name: tensor.half() for name, tensor in random_meta(config).items()}
    directory = save_meta(tmp_path / "meta", [source], multiple_of=4)
    converter.write_model(
        str(tmp_path / "expected"),
        str(directory),
        num_shards=1,
        vocab_size=TINY.vocab_size,
        llama_version="1",
    )
    meta_to_hf(directory, Output(tmp_path / "hf"))
    converted = read_weights(tmp_path / "hf")
    expected = read_weights(tmp_path / "expected")
    assert converted.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(converted[name].bfloat16(), tensor.bfloat16())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("stories260K_meta", torch.float32), ("stories260K_meta_mp4_bf16", torch.bfloat16)],
)
def test_a_real_model_in_both_layouts_is_the_same_model(tmp_path, shared, name, dtype):
    hf = shared / "models" / "stories260K"
    out = tmp_path / "hf"
    meta_to_hf(shared / "models" / name, Output(out), hf / "tokenizer.model", 512)
    expected = read_weights(hf)
    converted = read_weights(out)
    assert torch.equal(converted.pop(HEAD), expected[EMBEDDING].to(dtype))
    assert converted.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(converted[key], tensor.to(dtype))
    assert read_config(out) == replace(read_config(hf), tie_embeddings=False)
    assert (out / "tokenizer.model").is_file()


@settings(max_examples=25, deadline=None)
@given(
    num_shards=st.sampled_from([1, 2, 4, 8]),
    kv_per_shard=st.integers(1, 2),
    group=st.integers(1, 2),
    half_head=st.integers(1, 3),
    vocab_size=st.integers(8, 19),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    tie=st.booleans(),
)
def test_to_meta_and_back_is_exact(
    num_shards, kv_per_shard, group, half_head, vocab_size, dtype, tie
):
    n_kv_heads = num_shards * kv_per_shard
    config = replace(
        TINY,
        n_kv_heads=n_kv_heads,
        n_heads=n_kv_heads * group,
        head_dim=2 * half_head,
        dim=2 * half_head * n_kv_heads * group,
        n_layers=1,
        ffn_dim=num_shards * 5,
        vocab_size=vocab_size,
        tie_embeddings=tie,
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = Llama(config).initialise(torch.Generator().manual_seed(1)).to(dtype)
        save_model(model, root / "hf")
        hf_to_meta(root / "hf", Output(root / "meta"), num_shards)
        assert len(list((root / "meta").glob("consolidated.*.pth"))) == num_shards
        meta_to_hf(root / "meta", Output(root / "back"), max_seq_len=config.max_seq_len)
        assert read_config(root / "back") == replace(config, tie_embeddings=False)
        after = read_weights(root / "back")
        for name, tensor in read_weights(root / "hf").items():
            assert after[name].dtype == dtype
            assert torch.equal(after[name], tensor)


def test_a_vocabulary_that_does_not_divide_leaves_its_rest_to_the_last_shard(
    tmp_path, tiny_checkpoint
):
    hf_to_meta(tiny_checkpoint(vocab_size=53), Output(tmp_path / "meta"), num_shards=3)
    num_rows = []
    for shard in range(3):
        path = tmp_path / "meta" / f"consolidated.{shard:02d}.pth"
        num_rows.append(len(torch.load(path, weights_only=True)["output.weight"]))
    assert num_rows == [17, 17, 19]


def test_the_embedding_may_be_cut_by_rows_too(tmp_path):
    whole = random_meta()
    cut_by_rows = ("wq", "wk", "wv", "w1", "w3", "output")
    cut_by_columns = ("wo", "w2", "tok_embeddings")
    metas_shards = []
    other_shards = []
    for shard in (0, 1):
        tensors = {}
        for name, tensor in whole.items():
            module = name.split(".")[-2]
            if module in cut_by_rows:
                tensor = tensor.chunk(2, 0)[shard]
            elif module in cut_by_columns:
                tensor = tensor.chunk(2, 1)[shard]
            tensors[name] = tensor
        rows = whole["tok_embeddings.weight"].chunk(2, 0)[shard]
        metas_shards.append(tensors)
        other_shards.append(tensors | {"tok_embeddings.weight": rows})
    for name, shards in (("columns", metas_shards), ("rows", other_shards)):
        checkpoint = read_meta(save_meta(tmp_path / name, shards))
        assert torch.equal(checkpoint.tensors[EMBEDDING].read(), whole["tok_embeddings.weight"])


def test_params_give_the_width_of_every_published_model():
    for config in PUBLISHED.values():
        rule = find_ffn_rule(config.dim, config.ffn_dim)
        assert ffn_width(config.dim, *rule) == config.ffn_dim
    assert find_ffn_rule(4096, 11008) == (256, None)
    assert find_ffn_rule(8192, 28672) == (4096, 1.3)


@settings(max_examples=200, deadline=None)
@given(st.integers(4, 9000), st.integers(1, 40000))
def test_params_give_any_width(dim, ffn_dim):
    assert ffn_width(dim, *find_ffn_rule(dim, ffn_dim)) == ffn_dim


@pytest.mark.parametrize(
    ("params", "context"), [({"norm_eps": 1e-6}, 2048), ({}, 4096), ({"rope_theta": 1e6}, 16384)]
)
def test_the_context_length_follows_transformers_rule(tmp_path, params, context):
    directory = save_meta(tmp_path / "meta", [random_meta()], **params)
    conversion = meta_to_hf(directory, Output(tmp_path / "hf"))
    assert read_config(tmp_path / "hf").max_seq_len == context
    assert f"context length {context}" in str(conversion)


def test_the_context_length_of_65b_and_of_70b_differ_by_the_key_heads():
    """LLaMA-1's 65B and LLaMA-2's 70B have one width and one norm_eps."""
    params = MetaParams(8192, 80, 64, 64, 1e-5, rope_theta=10000.0, vocab_size=None)
    assert config_from_params(params, 32000, 22016).max_seq_len == 2048
    params = replace(params, n_kv_heads=8)
    assert config_from_params(params, 32000, 28672).max_seq_len == 4096
    params = replace(params, rope_theta=500_000.0)
    assert config_from_params(params, 128_256, 28672).max_seq_len == 8192


def test_metas_own_number_of_files_is_known():
    """7B came in one file, 13B in two, 30B in four, 65B and 70B in eight."""
    num_files = {"7b": 1, "13b": 2, "33b": 4, "65b": 8, "70b": 8}
    widths = {name: PUBLISHED[name].dim for name in num_files}
    assert {name: NUM_SHARDS.get(dim, 1) for name, dim in widths.items()} == num_files


def test_an_output_without_a_tokenizer_is_a_warning(tmp_path):
    directory = save_meta(tmp_path / "meta", [random_meta()])
    conversion = meta_to_hf(directory, Output(tmp_path / "hf"))
    assert f"warning: no tokenizer.model in {directory} or above it" in conversion.notes[0]


def test_a_tokenizer_that_contradicts_the_one_beside_the_weights_is_a_warning(
    tmp_path, small_tokenizer
):
    own = Path(__file__).parent / "golden/model/tokenizer.model"
    rows = max(small_tokenizer.size, open_tokenizer(own).size)
    directory = save_meta(tmp_path / "meta", [random_meta(replace(TINY, vocab_size=rows))])
    shutil.copy(own, directory / "tokenizer.model")
    warning = "is not the tokenizer of this model: id "
    conversion = meta_to_hf(directory, Output(tmp_path / "hf"), small_tokenizer.path)
    assert f"warning: {small_tokenizer.path} {warning}" in str(conversion)
    assert warning not in str(meta_to_hf(directory, Output(tmp_path / "same"), own))


def test_params_may_be_nested_under_model(tmp_path):
    directory = save_meta(tmp_path / "meta", [random_meta()])
    params = json.loads((directory / "params.json").read_text())
    (directory / "params.json").write_text(json.dumps({"model": params}))
    assert read_meta(directory).config.n_kv_heads == TINY.n_kv_heads
