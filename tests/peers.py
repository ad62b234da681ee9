"""The same checkpoint as other libraries see it: the outside oracles of these tests."""

from pathlib import Path

import pytest
import torch

HF_TINY = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def open_in_transformers(directory: Path):
    """The LlamaForCausalLM in a checkpoint directory: fp32, attention by the plain formula."""
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def open_in_peft(base: Path, adapter: Path, trainable: bool = False):
    """The same with a PEFT adapter directory on it."""
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(
        open_in_transformers(base), adapter, is_trainable=trainable
    )


def assert_same_logits(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    """The largest difference is below `tolerance` of the logits' scale."""
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
