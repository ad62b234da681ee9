"""Chapter: Meta's layout. The same network in another order: Meta's formula gives transformers' logits, and back to the bit."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import convert
from minillama.checkpoint.hf_format import open_weights, save_model
from minillama.conversion.meta import (
    _ffn_params,
    hf_to_meta,
    meta_to_hf,
    read_meta,
    to_halves,
    to_pairs,
)
from minillama.conversion.writer import Output
from minillama.errors import UserError
from minillama.hf_config import read_config
from minillama.llama_config import PUBLISHED, LlamaConfig, ffn_width
from minillama.model import Llama
from minillama.tensor_files import read_torch

# 6 query and 3 key/value heads: n_heads != n_kv_heads², so a key permuted as if it had all heads cannot come out right by chance.
TINY = LlamaConfig(
    dim=24,
    n_layers=2,
    n_heads=6,
    n_kv_heads=3,
    head_dim=4,
    ffn_dim=42,
    vocab_size=50,
    max_seq_len=64,
    norm_eps=1e-5,
    rope_theta=10000.0,
)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: entry.read() for name, entry in open_weights(directory).items()}


def save_meta(directory: Path, shards: list[dict[str, torch.Tensor]], **params) -> Path:
    directory.mkdir(exist_ok=True)
    for number, shard in enumerate(shards):
        torch.save(shard, directory / f"consolidated.{number:02d}.pth")
    (directory / "params.json").write_text(
        json.dumps(
            {
                "dim": TINY.dim,
                "n_layers": TINY.n_layers,
                "n_heads": TINY.n_heads,
                "n_kv_heads": TINY.n_kv_heads,
                "norm_eps": 1e-5,
                "vocab_size": -1,
            }
            | params
        )
    )
    return directory


def random_meta(config=TINY) -> dict[str, torch.Tensor]:
    """Meta's names and shapes, written out, with random values."""
    C, F, V, kv = config.dim, config.ffn_dim, config.vocab_size, config.n_kv_heads * config.head_dim
    shapes = {
        "tok_embeddings.weight": (V, C),
        "norm.weight": (C,),
        "output.weight": (V, C),
        "rope.freqs": (config.head_dim // 2,),
    }
    for i in range(config.n_layers):
        shapes |= {
            f"layers.{i}.{name}.weight": shape
            for name, shape in {
                "attention.wq": (C, C),
                "attention.wk": (kv, C),
                "attention.wv": (kv, C),
                "attention.wo": (C, C),
                "feed_forward.w1": (F, C),
                "feed_forward.w2": (C, F),
                "feed_forward.w3": (F, C),
                "attention_norm": (C,),
                "ffn_norm": (C,),
            }.items()
        }
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_permutation_by_hand():
    """One head of six rows: pairs (0,1) (2,3) (4,5) become halves 0,2,4 and 1,3,5."""
    rows = torch.arange(6.0).view(6, 1)
    assert to_halves(rows, heads=1).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    assert to_halves(rows.repeat(2, 1), heads=2).flatten().tolist() == [0, 2, 4, 1, 3, 5] * 2
    assert torch.equal(to_pairs(to_halves(rows, heads=1), heads=1), rows)


def meta_logits(w: dict[str, torch.Tensor], tokens: torch.Tensor, config=TINY) -> torch.Tensor:
    """LLaMA as Meta computes it: rotary positions as products of complex numbers, pairs of neighbours being one number."""
    T, D = len(tokens), config.head_dim
    angles = torch.outer(
        torch.arange(T), config.rope_theta ** (-torch.arange(0, D, 2) / D)
    )  # (T, D/2)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x, name):
        return (
            x
            * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps)
            * w[f"{name}.weight"]
        )

    def rotate(x):
        return torch.view_as_real(
            torch.view_as_complex(x.reshape(*x.shape[:-1], D // 2, 2)) * turn
        ).flatten(2)

    x = w["tok_embeddings.weight"][tokens]
    for i in range(config.n_layers):
        n = norm(x, f"layers.{i}.attention_norm")
        q, k, v = (
            (n @ w[f"layers.{i}.attention.w{part}.weight"].T).view(T, -1, D) for part in "qkv"
        )
        q, k = rotate(q), rotate(k)
        k, v = (part.repeat_interleave(config.n_heads // config.n_kv_heads, 1) for part in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / D**0.5 + torch.full((T, T), -torch.inf).triu(
            1
        )
        y = torch.einsum("hts,shd->thd", scores.softmax(-1), v).reshape(T, -1)
        x = x + y @ w[f"layers.{i}.attention.wo.weight"].T
        n = norm(x, f"layers.{i}.ffn_norm")
        gate, up = (n @ w[f"layers.{i}.feed_forward.w{part}.weight"].T for part in "13")
        x = x + (torch.nn.functional.silu(gate) * up) @ w[f"layers.{i}.feed_forward.w2.weight"].T
    return norm(x, "norm") @ w["output.weight"].T


def test_transformers_computes_on_the_converted_model_what_meta_computes_on_its_own(tmp_path):
    transformers = pytest.importorskip("transformers")
    source = random_meta()
    meta_to_hf(save_meta(tmp_path / "meta", [source]), Output(tmp_path / "hf"))
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.arange(17) * 7 % TINY.vocab_size
    torch.testing.assert_close(
        model(tokens[None]).logits[0], meta_logits(source, tokens), atol=1e-4, rtol=1e-4
    )


def test_transformers_own_converter_agrees(tmp_path):
    converter = pytest.importorskip(
        "transformers.models.llama.convert_llama_weights_to_hf",
        reason="this build of transformers comes without its Meta converter",
    )
    source = {
        name: tensor.half() for name, tensor in random_meta(replace(TINY, ffn_dim=64)).items()
    }
    directory = save_meta(tmp_path / "meta", [source], multiple_of=4)
    converter.write_model(
        str(tmp_path / "theirs"),
        str(directory),
        num_shards=1,
        vocab_size=TINY.vocab_size,
        llama_version="1",
    )
    meta_to_hf(directory, Output(tmp_path / "ours"))
    ours, theirs = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].bfloat16(), theirs[name].bfloat16()) for name in ours)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("stories260K_meta", torch.float32), ("stories260K_meta_mp4_bf16", torch.bfloat16)],
)
def test_a_real_model_in_both_layouts_is_the_same_model(tmp_path, shared, name, dtype):
    meta_to_hf(
        shared / "models" / name,
        Output(tmp_path / "hf"),
        str(shared / "models/stories260K/tokenizer.model"),
        512,
    )
    expected = weights(shared / "models" / "stories260K")
    found = weights(tmp_path / "hf")
    assert torch.equal(found.pop("lm_head.weight"), expected["model.embed_tokens.weight"].to(dtype))
    assert found.keys() == expected.keys() and all(
        torch.equal(found[key], expected[key].to(dtype)) for key in expected
    )
    theirs, ours = read_config(shared / "models" / "stories260K"), read_config(tmp_path / "hf")
    assert ours == replace(theirs, tie_embeddings=False)
    assert (tmp_path / "hf" / "tokenizer.model").is_file()


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(8, 19),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.booleans(),
)
def test_to_meta_and_back_is_exact(shards, kv_per_shard, group, half_head, vocab_size, dtype, tie):
    K = shards * kv_per_shard
    config = replace(
        TINY,
        n_kv_heads=K,
        n_heads=K * group,
        head_dim=2 * half_head,
        dim=2 * half_head * K * group,
        n_layers=1,
        ffn_dim=shards * 5,
        vocab_size=vocab_size,
        tie_embeddings=tie,
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_model(
            Llama(config).initialise(torch.Generator().manual_seed(1)).to(dtype), root / "hf"
        )
        hf_to_meta(root / "hf", Output(root / "meta"), shards)
        assert len(list((root / "meta").glob("consolidated.*.pth"))) == shards
        meta_to_hf(root / "meta", Output(root / "back"), max_seq_len=config.max_seq_len)
        before, after = weights(root / "hf"), weights(root / "back")
        assert read_config(root / "back") == replace(config, tie_embeddings=False)
        assert all(
            torch.equal(after[name], tensor) and after[name].dtype == dtype
            for name, tensor in before.items()
        )


def test_a_vocabulary_that_does_not_divide_leaves_its_rest_to_the_last_shard(
    tmp_path, tiny_checkpoint
):
    hf_to_meta(tiny_checkpoint(vocab_size=53), Output(tmp_path / "meta"), shards=3)
    rows = [
        read_torch(tmp_path / "meta" / f"consolidated.{i:02d}.pth")["output.weight"].shape[0]
        for i in range(3)
    ]
    assert rows == [17, 17, 19]


def test_the_embedding_may_be_cut_by_rows_too(tmp_path):
    whole = random_meta()
    by_columns, by_rows = ([], [])
    for shard in (0, 1):
        cut = {
            name: t.chunk(2, 0)[shard]
            if name.split(".")[-2] in ("wq", "wk", "wv", "w1", "w3", "output")
            else t.chunk(2, 1)[shard]
            if name.split(".")[-2] in ("wo", "w2", "tok_embeddings")
            else t
            for name, t in whole.items()
        }
        by_columns.append(cut)
        by_rows.append(
            cut | {"tok_embeddings.weight": whole["tok_embeddings.weight"].chunk(2, 0)[shard]}
        )
    recipes = [
        read_meta(save_meta(tmp_path / name, shards))[1]["model.embed_tokens.weight"]
        for name, shards in (("columns", by_columns), ("rows", by_rows))
    ]
    assert all(torch.equal(recipe.read(), whole["tok_embeddings.weight"]) for recipe in recipes)


def test_params_say_again_the_width_of_every_published_model():
    for name, config in PUBLISHED.items():
        assert ffn_width(config.dim, *_ffn_params(config.dim, config.ffn_dim)) == config.ffn_dim, (
            name
        )
    assert _ffn_params(4096, 11008) == (256, None) and _ffn_params(8192, 28672) == (4096, 1.3)


@settings(max_examples=200, deadline=None)
@given(st.integers(4, 9000), st.integers(1, 40000))
def test_params_say_any_width(dim, ffn_dim):
    assert ffn_width(dim, *_ffn_params(dim, ffn_dim)) == ffn_dim


@pytest.mark.parametrize(
    ("params", "context"), [({"norm_eps": 1e-6}, 2048), ({}, 4096), ({"rope_theta": 1e6}, 16384)]
)
def test_the_context_length_follows_transformers_rule(tmp_path, params, context, capsys):
    meta_to_hf(save_meta(tmp_path / "meta", [random_meta()], **params), Output(tmp_path / "hf"))
    assert (
        read_config(tmp_path / "hf").max_seq_len == context
        and f"context length {context}" in capsys.readouterr().out
    )


def test_params_may_be_nested_under_model(tmp_path):
    directory = save_meta(tmp_path / "meta", [random_meta()])
    (directory / "params.json").write_text(
        json.dumps({"model": json.loads((directory / "params.json").read_text())})
    )
    assert read_meta(directory)[0].n_kv_heads == TINY.n_kv_heads


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "params.json").unlink(), "no such file"),
        (lambda d: (d / "params.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "params.json").write_text('{"dim": 24}'), "n_layers = None"),
        (lambda d: save_meta(d, [], use_scaled_rope=True), "use_scaled_rope"),
        (lambda d: save_meta(d, [], vocab_size=49), "vocab_size = 49, the embedding has 50 rows"),
        (lambda d: save_meta(d, [], n_layers=3), "params.json says 3 layers"),
        (
            lambda d: save_meta(d, [], n_layers=1),
            r"1 layers, and layers\.1\.attention\.wk\.weight is none of their tensors",
        ),
        (
            lambda d: save_meta(d, [random_meta(), random_meta() | {"stray": torch.ones(1)}]),
            "stray is none of their tensors",
        ),
        (lambda d: save_meta(d, [], n_kv_heads=6), "do not fit config.json"),
        (lambda d: save_meta(d, [random_meta(), {}]), r"consolidated\.01\.pth: lacks"),
        (
            lambda d: save_meta(d, [random_meta() | {"norm.weight": torch.ones(25)}]),
            "do not fit config.json",
        ),
        (lambda d: (d / "consolidated.00.pth").write_bytes(b"<html>"), "web page"),
        (lambda d: (d / "consolidated.00.pth").unlink(), "holds no consolidated"),
    ],
)
def test_a_broken_meta_directory_is_refused_by_name(tmp_path, break_it, message):
    directory = save_meta(tmp_path / "meta", [random_meta()])
    break_it(directory)
    with pytest.raises(UserError, match=message):
        convert.main(["meta", "--input", str(directory), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_shards_of_different_models_are_told_by_their_norms(tmp_path, tiny_checkpoint):
    hf_to_meta(tiny_checkpoint(), Output(tmp_path / "meta"), shards=3)
    hf_to_meta(tiny_checkpoint("other", seed=9), Output(tmp_path / "other-meta"), shards=3)
    (tmp_path / "other-meta" / "consolidated.01.pth").replace(
        tmp_path / "meta" / "consolidated.01.pth"
    )
    with pytest.raises(UserError, match="differs between the shards"):
        meta_to_hf(tmp_path / "meta", Output(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path, shared):
    directory = save_meta(tmp_path / "meta", [random_meta()])
    with pytest.raises(UserError, match="32000 pieces, but the embedding has 50 rows"):
        meta_to_hf(
            directory, Output(tmp_path / "out"), str(shared / "tokenizers/llama/tokenizer.model")
        )


@pytest.mark.parametrize(
    ("changes", "shards", "message"),
    [
        ({}, 2, "n_kv_heads = 3 cannot be cut into 2 shards"),
        ({"attention_bias": True}, 1, "no biases"),
        ({"head_dim": 6}, 1, "head_dim = 6"),
    ],
)
def test_what_metas_layout_cannot_say_is_refused(
    tmp_path, tiny_checkpoint, changes, shards, message
):
    with pytest.raises(UserError, match=message):
        hf_to_meta(tiny_checkpoint(**changes), Output(tmp_path / "out"), shards)


def test_a_meta_directory_given_as_a_checkpoint_shows_the_command(tmp_path):
    directory = save_meta(tmp_path / "meta", [random_meta()])
    with pytest.raises(UserError, match=r"python convert\.py meta --input"):
        open_weights(directory)
