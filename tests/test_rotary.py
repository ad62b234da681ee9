"""Rotary frequencies: those of transformers at the sizes of published models."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from minillama import ops
from minillama.hf_config import from_hf
from minillama.ops.rotary import rope_frequencies, rope_magnitude
from tests.conftest import TINY, random_model, random_tokens
from tests.peers import HF_TINY

# Heads of 64, so that ramps have pairs before, on and behind them.
LARGE: dict[str, Any] = HF_TINY | {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64}
LARGE |= {"num_key_value_heads": 2, "max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 4096,
}


@pytest.mark.parametrize(
    ("scaling", "theta"),
    [
        (YARN, 1e4),
        (YARN, 100.0),  # the ramp ends behind the last pair
        (YARN | {"truncate": False}, 1e4),
        (YARN | {"beta_fast": 4.0, "beta_slow": 0.5}, 5e5),
        (YARN | {"factor": 0.5}, 1e4),
        (YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}, 1e4),
        ({"rope_type": "yarn", "factor": 4.0}, 1e4),
        (LLAMA3, 5e5),
        (LLAMA3, 100.0),
    ],
    ids=str,
)
def test_frequencies_are_transformers(scaling: dict[str, Any], theta: float) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    raw = LARGE | {"rope_scaling": scaling, "rope_theta": theta}
    config = from_hf(raw)
    function = ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
    theirs, magnitude = function(transformers.LlamaConfig(**raw), "cpu")
    torch.testing.assert_close(rope_frequencies(config, 100), theirs, rtol=1e-6, atol=0)
    assert rope_magnitude(config) == pytest.approx(magnitude)


def test_tables_of_another_base_are_not_kept() -> None:
    """Generation beyond the context raises the base, and the next prompt may need none."""
    tables = ops.RotaryTables()
    raised = replace(TINY, rope_theta=5e4)
    for config in (TINY, raised, TINY):
        cos, sin = tables.get(config, 8, torch.device("cpu"))
        expected_cos, expected_sin = ops.rope_tables(config, 8)
        assert torch.equal(cos[:8], expected_cos)
        assert torch.equal(sin[:8], expected_sin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_tables_of_a_16_bit_model_are_those_of_fp32(dtype: torch.dtype) -> None:
    model = random_model().to(dtype)
    cos, sin = model.rotary_tables(random_tokens(1, 8), None, None)
    assert torch.equal(cos, ops.rope_tables(TINY, 8)[0])
    assert torch.equal(sin, ops.rope_tables(TINY, 8)[1])
