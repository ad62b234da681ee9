"""config.json in and out: published shapes, other spellings, and what is refused by name."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillama import ops
from minillama.errors import UserError
from minillama.hf_config import from_hf, published, read_config, to_hf
from minillama.llama_config import PUBLISHED, ffn_width
from tests.conftest import random_model
from tests.peers import HF_TINY, LLAMA3


def test_every_published_config_is_read_as_transformers_reads_it_or_refused_by_name(
    shared: Path,
) -> None:
    transformers = pytest.importorskip("transformers")
    for path in sorted((shared / "configs").glob("*.json")):
        if "hidden_size" not in json.loads(path.read_text()):
            with pytest.raises(
                UserError, match=f"{re.escape(path.name)}: key 'hidden_size' is missing"
            ):
                read_config(path)
            continue
        ours, theirs = read_config(path), transformers.LlamaConfig.from_json_file(path)
        assert (
            ours.dim,
            ours.n_layers,
            ours.n_heads,
            ours.n_kv_heads,
            ours.head_dim,
            ours.ffn_dim,
            ours.vocab_size,
        ) == (
            theirs.hidden_size,
            theirs.num_hidden_layers,
            theirs.num_attention_heads,
            theirs.num_key_value_heads,
            theirs.head_dim,
            theirs.intermediate_size,
            theirs.vocab_size,
        ), path.name
        assert (
            ours.max_seq_len,
            ours.norm_eps,
            ours.rope_theta,
            ours.tie_embeddings,
            ours.bos_id,
        ) == (
            theirs.max_position_embeddings,
            theirs.rms_norm_eps,
            theirs.rope_theta,
            theirs.tie_word_embeddings,
            theirs.bos_token_id,
        )
        assert list(ours.eos_ids) == (
            theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
        )
        frequencies = ops.rotary.rope_frequencies(ours, 8)
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
        assert torch.allclose(frequencies, rotary.inv_freq, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "vocab_size", "expected"),
    [
        ("llama1-7b", 32000, 6_738_415_616),
        ("llama1-13b", 32000, 13_015_864_320),
        ("33b", 32000, 32_528_943_616),
        ("65b", 32000, 65_285_660_672),
        ("7b", 32000, 6_738_415_616),
        ("13b", 32000, 13_015_864_320),
        ("34b", 32000, 33_743_970_304),
        ("70b", 32000, 68_976_648_192),
        ("7b", 49953, 6_885_486_592),
        ("chinese-7b", 55296, 6_929_256_448),
        ("chinese-13b", 55296, 13_254_415_360),
    ],
)
def test_published_sizes_have_the_published_parameter_counts(
    name: str, vocab_size: int, expected: int
) -> None:
    assert replace(published(name), vocab_size=vocab_size).parameter_count() == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"head_dim": 10},
    ],
    ids=str,
)
def test_parameter_shapes_are_those_of_the_model(changes: dict) -> None:
    model = random_model(**changes)
    assert {
        name: tuple(p.shape) for name, p in model.named_parameters()
    } == model.config.parameter_shapes()


def test_metas_rule_gives_the_published_mlp_widths() -> None:
    assert [
        ffn_width(4096, 256),
        ffn_width(5120, 256),
        ffn_width(6656, 256),
        ffn_width(8192, 256),
    ] == [11008, 13824, 17920, 22016]
    assert ffn_width(8192, 4096, 1.3) == 28672


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama3-8b", 8_030_261_248),
        ("llama3.1-70b", 70_553_706_496),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
    ],
)
def test_the_shapes_of_llama_3_have_the_published_number_of_parameters(
    name: str, count: int
) -> None:
    assert published(name).parameter_count() == count


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("llama3.1-8b", "mlc_llama3_1_8b"),
        ("llama3.1-70b", "mlc_llama3_1_70b"),
        ("llama3.2-1b", "mlc_llama3_2_1b"),
        ("llama3.2-3b", "mlc_llama3_2_3b"),
    ],
)
def test_the_shapes_of_llama_3_are_those_of_published_files(
    name: str, file: str, shared: Path
) -> None:
    """Instruction-tuned files name more tokens that end a text."""
    theirs = read_config(shared / f"configs/{file}.config.json")
    assert published(name) == replace(theirs, eos_ids=(128001,))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_written_and_read_is_the_same(name: str) -> None:
    assert from_hf(to_hf(PUBLISHED[name])) == PUBLISHED[name]


def test_rope_parameters_is_the_new_spelling_of_rope_theta_and_rope_scaling() -> None:
    """transformers 5 writes one table where transformers 4 wrote two keys."""
    old = HF_TINY | {"rope_theta": 5e5, "rope_scaling": LLAMA3}
    new = {key: value for key, value in HF_TINY.items() if key != "rope_theta"} | {
        "rope_parameters": {"rope_theta": 5e5, **LLAMA3}
    }
    assert from_hf(new) == from_hf(old)


def test_theta_is_ten_thousand_only_where_neither_spelling_gives_it() -> None:
    without = {key: value for key, value in HF_TINY.items() if key != "rope_theta"}
    assert from_hf(without).rope_theta == 10000.0
    assert (
        from_hf(
            without | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
        ).rope_theta
        == 5e5
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"model_type": "mistral"}, "model_type = 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope scaling 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope scaling 'linear' has no factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
            "original_max_position_embeddings",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "wobble": 1}},
            "unknown key ['wobble']",
        ),
        ({"num_key_value_heads": 4}, "n_heads = 6 is not a multiple of n_kv_heads = 4"),
        ({"head_dim": 7}, "head_dim = 7 is odd"),
        ({"hidden_size": "48"}, "wrong type"),
        ({"rms_norm_eps": 0.0}, "norm_eps = 0.0"),
        ({"vocab_size": 0}, "vocab_size = 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_that_cannot_be_honoured_is_refused_by_name(changes: dict, named: str) -> None:
    with pytest.raises(UserError) as error:
        from_hf(HF_TINY | changes)
    assert named in str(error.value)


def test_a_config_file_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        read_config(tmp_path)


def test_an_unknown_size_names_the_closest() -> None:
    with pytest.raises(UserError, match="did you mean '13b'"):
        published("13bb")
