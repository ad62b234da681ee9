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

torch.set_num_threads(1)  # one thread adds in one order, and forked ranks do not fight over the processor

# 6 query and 3 key/value heads: n_heads != n_kv_heads², so a confusion of the two counts cannot come out right by chance.
TINY = LlamaConfig(dim=24, n_layers=2, n_heads=6, n_kv_heads=3, head_dim=4, ffn_dim=40, vocab_size=50, max_seq_len=64,
                   norm_eps=1e-5, rope_theta=10000.0)


def random_model(seed: int = 0, **changes) -> Llama:
    """A tiny model in which every parameter matters: norms are not 1, biases not 0, attention not uniform."""
    model = Llama(replace(TINY, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float(name.endswith("norm.weight")), 0.2, generator=generator)
    return model


def random_tokens(*shape: int, vocab_size: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real inputs that is not part of the project; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("MINILLAMA_SHARED") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"real inputs not found ({folder}); MINILLAMA_SHARED names their folder")
    return folder


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a small random checkpoint and returns its directory; keywords change its config."""

    def write(name: str = "base", dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> Path:
        save_model(random_model(seed, **changes).to(dtype), tmp_path / name)
        return tmp_path / name

    return write
