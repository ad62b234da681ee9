"""Fixtures that several chapters' tests share."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillama.architecture import LlamaConfig
from minillama.checkpoint.directory import save_model
from minillama.model import Llama

TINY = LlamaConfig(dim=24, n_layers=2, n_heads=6, n_kv_heads=3, head_dim=4, ffn_dim=42, vocab_size=50, max_seq_len=64,
                   norm_eps=1e-5, rope_theta=10000.0)


@pytest.fixture
def shared() -> Path:
    """The folder of real inputs that is not part of the project; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("MINILLAMA_SHARED", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real inputs not found ({folder}); MINILLAMA_SHARED names their folder")
    return folder


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a small random checkpoint and returns its directory; keywords change its config."""

    def write(name: str = "base", dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> Path:
        config = replace(TINY, **changes)
        model = Llama(config).initialise(torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed + 1)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        save_model(model.to(dtype), tmp_path / name)
        return tmp_path / name

    return write
