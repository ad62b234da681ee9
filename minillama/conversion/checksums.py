"""Is this the same model? A manifest holds two answers: one for the files, one for the weights.

The sha256 of a file covers zip metadata, shard boundaries and torch versions, so the same weights
saved twice seldom have the same sha256. The content fingerprint covers the weights alone:

    for each tensor, in the order of names     "name dtype shape sha256-of-its-bytes"
    content                                    sha256 of these lines

Equal weights have equal fingerprints: in safetensors or .bin, in one file or forty, in Meta's
layout or Hugging Face's.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minillama.checkpoint.hf_reader import open_weights
from minillama.conversion.meta_reader import read_meta
from minillama.conversion.published_hashes import PublishedMatch, check_published, is_hash_list
from minillama.conversion.writer import LazyTensors
from minillama.errors import UserError
from minillama.files import is_temporary, read_json, sha256_of, write_json
from minillama.hub import hub_hint
from minillama.peft_adapters import adapter_tensors
from minillama.tensor_writers import bytes_of

MANIFEST = "manifest.json"
MUST_BE_EQUAL = ("dtype", "shape", "sha256")  # of a tensor; norm follows from them


@dataclass(frozen=True)
class WrittenManifest:
    """A manifest that was written. `str()` gives the line for the user."""

    directory: Path
    content: str  # the fingerprint

    def __str__(self) -> str:
        return f"{self.directory}: content {self.content}"


@dataclass(frozen=True)
class Equality:
    """Two checkpoints with equal tensors. `str()` gives the lines for the user."""

    content: str  # the fingerprint
    num_tensors: int
    notes: tuple[str, ...]  # on other files, which may differ

    def __str__(self) -> str:
        summary = f"content {self.content}: all {self.num_tensors} tensors are equal"
        return "\n".join([summary, *self.notes])


def write_manifest(directory: Path) -> WrittenManifest:
    """Write DIR/manifest.json for a checkpoint. Returns its hash, and the directory."""
    content = manifest(directory)
    write_json(directory / MANIFEST, content)
    return WrittenManifest(directory, content["content"])


def check(directory: Path, against: Path) -> Equality | PublishedMatch:
    """Compare a checkpoint with a manifest, another checkpoint, or a published list of sha256.

    Returns the hash of their content and how many tensors are equal, or which model it is.

    Raises UserError naming the first tensor that differs. It says by how much, element by element
    if `against` is a directory, and else by the norms.
    """
    if against.is_file() and is_hash_list(against):
        return check_published(directory, against)
    expected = manifest(against) if against.is_dir() else _read_manifest(against)
    actual = manifest(directory)
    if "tensors" not in expected:  # of a run's final/
        _refuse_other_files(directory, against, actual["files"], expected["files"])
        expected["tensors"] = actual["tensors"]
    for name in sorted(actual["tensors"] | expected["tensors"]):
        if name not in expected["tensors"]:
            raise UserError(f"{name}: only in {directory}")
        if name not in actual["tensors"]:
            raise UserError(f"{name}: only in {against}")
        difference = _compare_tensor(directory, against, name, actual, expected)
        if difference:
            raise UserError(
                f"{name}: the first tensor that differs between {directory} and {against}: "
                f"{difference}"
            )
    notes = _compare_files(actual["files"], expected["files"])
    return Equality(actual["content"], len(actual["tensors"]), tuple(notes))


def manifest(directory: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's manifest.

    {"version": 1, "content": fingerprint, "tensors": {name: {dtype, shape, sha256, norm}},
    "files": {name: {bytes, sha256}}}
    """
    tensors = open_tensors(directory)
    described = {}
    content = hashlib.sha256()
    for name in tqdm(sorted(tensors), unit="tensor", disable=None):
        entry = _describe(tensors[name].read())
        described[name] = entry
        line = f"{name} {entry['dtype']} {entry['shape']} {entry['sha256']}\n"
        content.update(line.encode())
    files = {}
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.name != MANIFEST and not is_temporary(path):
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    fingerprint = content.hexdigest()
    return {"version": 1, "content": fingerprint, "tensors": described, "files": files}


def open_tensors(directory: Path) -> LazyTensors:
    """Return the tensors of a checkpoint in Hugging Face's or Meta's layout, or of an adapter.

    Meta's are whole, under Hugging Face's names.
    """
    if list(directory.glob("consolidated.*.pth")):
        return read_meta(directory).tensors
    if (directory / "adapter_config.json").is_file():
        return adapter_tensors(directory)
    return open_weights(directory)


def _describe(tensor: Tensor) -> dict[str, Any]:
    tensor = tensor.contiguous()
    digest = hashlib.sha256(bytes_of(tensor)).hexdigest()
    dtype = str(tensor.dtype).removeprefix("torch.")
    norm = 0.0
    if tensor.is_floating_point():
        norm = torch.linalg.vector_norm(tensor, dtype=torch.float64).item()
    return {"dtype": dtype, "shape": list(tensor.shape), "sha256": digest, "norm": norm}


def _read_manifest(path: Path) -> dict[str, Any]:
    remedy = f"`convert.py sha256 DIR` writes one{hub_hint(path)}"
    return read_json(path, remedy, {"files": dict}, "a manifest of convert.py sha256")


def _refuse_other_files(
    directory: Path, against: Path, actual: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Raise UserError for the first file whose content is not what a manifest says."""
    for name, recorded in expected.items():
        if actual.get(name, {}).get("sha256") != recorded["sha256"]:
            raise UserError(f"{directory / name}: its content is not what {against} says")


def _compare_tensor(
    directory: Path, against: Path, name: str, actual: dict[str, Any], expected: dict[str, Any]
) -> str:
    """Describe the difference between two tensors; "": they are equal."""
    here = actual["tensors"][name]
    there = expected["tensors"][name]
    unequal = [key for key in MUST_BE_EQUAL if here[key] != there.get(key)]
    if not unequal:
        return ""
    if unequal != ["sha256"]:
        key = unequal[0]
        return f"{key} {here[key]} here, {there.get(key)} there"
    if not against.is_dir():
        remedy = "--check GOOD_DIR compares with another copy, element by element"
        return f"its norm is {here['norm']:.9g} here, {there.get('norm')} there ({remedy})"
    one = open_tensors(directory)[name].read()
    other = open_tensors(against)[name].read()
    return _compare_elements(one, other)


def _compare_elements(one: Tensor, other: Tensor) -> str:
    """Describe the largest difference between tensors of one dtype and shape."""
    a = one.float().view(-1)
    b = other.float().view(-1)
    gap = (a - b).abs().nan_to_num(nan=torch.inf)
    worst = int(gap.argmax())
    element = f"element {worst}: {a[worst]:.6g} here, {b[worst]:.6g} there"
    num_unequal = int((a != b).sum())
    return f"by up to {gap[worst]:.3g} ({element}), in {num_unequal} elements"


def _compare_files(actual: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return a note for each file that differs or is on one side only."""
    notes = []
    for name in sorted(actual | expected):
        if name not in actual or name not in expected:
            notes.append(f"note: {name} is on one side only")
        elif actual[name]["sha256"] != expected[name]["sha256"]:
            notes.append(f"note: {name} differs")
    return notes
