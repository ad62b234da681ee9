"""What the tests of Megatron's files share: models by a formula, and what a file holds."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minillama.checkpoint.hf_reader import open_weights
from minillama.checkpoint.hf_writer import write_configs, write_weights
from minillama.llama_config import LlamaConfig
from minillama.tensor_writers import specs_of


def formula_config(L: int, C: int, H: int, K: int, F: int, V: int, bias: bool) -> LlamaConfig:
    return LlamaConfig(
        dim=C,
        n_layers=L,
        n_heads=H,
        n_kv_heads=K,
        head_dim=C // H,
        ffn_dim=F,
        vocab_size=V,
        max_seq_len=128,
        norm_eps=1e-5,
        rope_theta=10000.0,
        attention_bias=bias,
    )


def formula_weights(config: LlamaConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of the models that were given to the real converters.

    Element k of the i-th tensor, in the order of names, is (2654435761 k + 40503 i mod 2³²) / 2³²,
    moved to -0.1 … 0.1, and for a norm to 0.9 … 1.1. So all elements of a model differ.
    """
    weights = {}
    for number, (name, shape) in enumerate(sorted(config.parameter_shapes().items())):
        index = np.arange(np.prod(shape), dtype=np.uint64)
        hashed = (index * 2654435761 + number * 40503) % 2**32
        values = (hashed / 2**32 - 0.5) * 0.2 + float("norm" in name)
        weights[name] = torch.from_numpy(values).to(dtype).view(shape)
    return weights


def save_weights(directory: Path, config: LlamaConfig, weights: dict[str, Tensor]) -> Path:
    """Write a Hugging Face directory."""
    directory.mkdir(parents=True)
    write_weights(directory, iter(weights.items()), specs_of(weights))
    write_configs(directory, config, weights["model.norm.weight"].dtype)
    return directory


def leaves(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what nested dictionaries hold, and the empty ones, by path, in their order."""
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def described(path: Path) -> list[list[Any]]:
    """What a file of torch.save holds, as the JSON lists of the real converters say it."""
    rows: list[list[Any]] = []
    for name, value in leaves(torch.load(path, weights_only=True)):
        if isinstance(value, Tensor):
            content = value.contiguous().view(torch.uint8).numpy().tobytes()
            sha256 = hashlib.sha256(content).hexdigest()
            dtype = str(value.dtype).removeprefix("torch.")
            rows.append([name, list(value.shape), dtype, sha256])
        else:
            rows.append([name, str(value)])
    return rows


def described_directory(directory: Path, names: list[str]) -> dict[str, Any]:
    files: dict[str, Any] = {}
    for name in names:
        path = directory / name
        files[name] = described(path) if path.suffix == ".pt" else path.read_text()
    return files


def cases_of(shared: Path, name: str) -> dict[str, Any]:
    return json.loads((shared / "parallel" / name).read_text())


def assert_same_weights(one: Path, other: Path) -> None:
    """Both Hugging Face directories have the same names, dtypes, shapes and bytes."""
    tensors = {name: tensor.read() for name, tensor in open_weights(one).items()}
    expected = {name: tensor.read() for name, tensor in open_weights(other).items()}
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name
