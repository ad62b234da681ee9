"""config.json where a key is missing, or two spellings of one number are there."""

from dataclasses import replace
from typing import Any

import pytest

from minillama.errors import UserError
from minillama.hf_config import from_hf, to_hf
from tests.conftest import TINY
from tests.peers import HF_TINY

LINEAR = {"rope_type": "linear", "factor": 2.0}


def test_what_is_missing_is_transformers_default() -> None:
    transformers = pytest.importorskip("transformers")
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    raw = {key: HF_TINY[key] for key in (*keys, "vocab_size", "rms_norm_eps")}
    ours = from_hf(raw)
    theirs = transformers.LlamaConfig(**raw)
    assert ours.max_seq_len == theirs.max_position_embeddings
    assert ours.eos_ids == (theirs.eos_token_id,)
    assert ours.bos_id == theirs.bos_token_id
    assert ours.n_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == theirs.head_dim
    assert ours.initializer_range == theirs.initializer_range
    assert ours.tie_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    "changes",
    [{"eos_ids": (3, 7)}, {"eos_ids": ()}, {"bos_id": 5}, {"initializer_range": 0.3}],
    ids=str,
)
def test_what_is_written_is_read_again(changes: dict[str, Any]) -> None:
    config = replace(TINY, **changes)
    assert from_hf(to_hf(config)) == config


def test_two_spellings_of_the_same_are_one() -> None:
    both = HF_TINY | {
        "rope_theta": 5e5,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": LINEAR | {"rope_theta": 500000},
    }
    assert from_hf(both) == from_hf(HF_TINY | {"rope_theta": 5e5, "rope_scaling": LINEAR})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 10000.0 "),
        ({"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 4.0}}, "factor is 2.0 "),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "default"},
            },
            "rope_type is 'linear' ",
        ),
    ],
    ids=["theta", "factor", "kind"],
)
def test_two_spellings_that_contradict_are_refused(changes: dict[str, Any], named: str) -> None:
    """transformers 4 reads one of them, transformers 5 the other."""
    with pytest.raises(UserError, match=named):
        from_hf(HF_TINY | changes)
