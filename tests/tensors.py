"""Small tensors in files, for the tests of files."""

from pathlib import Path

import torch

from minillama.tensor_writers import specs_of


def random_tensors(specs: list[tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
    return {
        f"layer.{i}.weight": (100 * torch.rand(shape)).to(dtype)
        for i, (dtype, shape) in enumerate(specs)
    }


def write(writer, path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with writer(path, specs_of(tensors)) as append:
        for name, tensor in tensors.items():
            append(name, tensor)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def read(reader, path: Path) -> dict[str, torch.Tensor]:
    return {name: entry.read() for name, entry in reader(path).items()}
