"""Is this the same model? A manifest answers twice: for the files, and for what they mean.

The sha256 of a file covers zip metadata, shard boundaries and torch versions, so the same weights saved twice seldom agree. The
content fingerprint covers the weights alone: for each tensor, in the order of names, its name, dtype, shape and the sha256 of its
bytes. Safetensors or .bin, one file or forty, Meta's layout or Hugging Face's: equal weights have equal fingerprints.
"""

import hashlib
import json
from pathlib import Path

import torch
from tqdm import tqdm

from minillama.checkpoint.hf_format import open_weights
from minillama.conversion.meta import read_meta
from minillama.conversion.writer import LazyTensors, write_file
from minillama.errors import UserError, read_json
from minillama.files import sha256_of
from minillama.peft_adapters import adapter_tensors
from minillama.tensor_writers import bytes_of

MANIFEST, ABSENT = "manifest.json", "`convert.py sha256 DIR` writes one"


def recipes_of(directory: Path) -> LazyTensors:
    """The tensors of a checkpoint: Hugging Face's, Meta's (under Hugging Face's names, whole) or an adapter's."""
    if list(directory.glob("consolidated.*.pth")):
        return read_meta(directory)[1]
    if (directory / "adapter_config.json").is_file():
        return adapter_tensors(directory)
    return open_weights(directory)


def manifest(directory: Path) -> dict:
    """{"content": fingerprint, "tensors": {name: dtype, shape, sha256, norm}, "files": {name: bytes, sha256}} of a checkpoint."""
    tensors, recipes = {}, recipes_of(directory)
    for name in tqdm(sorted(recipes), unit="tensor", disable=None):
        tensor = recipes[name].read().contiguous()
        norm = (
            torch.linalg.vector_norm(tensor, dtype=torch.float64).item()
            if tensor.is_floating_point()
            else 0.0
        )
        tensors[name] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "sha256": hashlib.sha256(bytes_of(tensor)).hexdigest(),
            "norm": norm,
        }
    lines = (
        f"{name} {line['dtype']} {line['shape']} {line['sha256']}\n"
        for name, line in tensors.items()
    )
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(directory.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    return {
        "version": 1,
        "content": hashlib.sha256("".join(lines).encode()).hexdigest(),
        "tensors": tensors,
        "files": files,
    }


def write_manifest(directory: Path) -> str:
    """Write DIR/manifest.json and return the content fingerprint."""
    made = manifest(directory)
    write_file(
        directory / MANIFEST,
        json.dumps(made, indent=2, ensure_ascii=False).encode() + b"\n",
        overwrite=True,
    )
    return made["content"]


def check(directory: Path, against: Path) -> list[str]:
    """Compare `directory` with a manifest file, or with another checkpoint directory. Returns remarks on what is equal enough.
    Raises UserError naming the first tensor that differs, and by how much where both sides' tensors are at hand."""
    wanted = (
        {}
        if against.is_dir()
        else read_json(
            against, ABSENT, {"tensors": dict, "files": dict}, "a manifest of convert.py sha256"
        )
    )
    found, wanted = manifest(directory), wanted or manifest(against)
    ours, theirs = found["tensors"], wanted["tensors"]
    for name in sorted(ours | theirs):
        if name not in ours or name not in theirs:
            raise UserError(f"{name}: only in {directory if name in ours else against}")
        here, there = ours[name], theirs[name]
        if wrong := [
            what for what in ("dtype", "shape", "sha256") if here[what] != there.get(what)
        ]:
            gap = (
                _distance(directory, against, name, here, there)
                if wrong == ["sha256"]
                else (f"{wrong[0]} {here[wrong[0]]} here, {there.get(wrong[0])} there")
            )
            raise UserError(
                f"{name}: the first tensor that differs between {directory} and {against}: {gap}"
            )
    sides = {
        name: (found["files"].get(name), wanted["files"].get(name))
        for name in sorted(found["files"] | wanted["files"])
    }
    notes = [
        f"note: {name} {'differs' if a and b else 'is on one side only'}"
        for name, (a, b) in sides.items()
        if a != b
    ]
    return [f"content {found['content']}: all {len(ours)} tensors are equal", *notes]


def _distance(directory: Path, against: Path, name: str, here: dict, there: dict) -> str:
    """How far apart two tensors of one dtype and shape are: element by element, or by their norms where only a manifest is at hand."""
    if not against.is_dir():
        return (
            f"its norm is {here['norm']:.9g} here, {there.get('norm')} there "
            "(--check GOOD_DIR compares with another copy, element by element)"
        )
    a, b = (recipes_of(side)[name].read().float().view(-1) for side in (directory, against))
    gap = (a - b).abs().nan_to_num(nan=torch.inf)
    worst = int(gap.argmax())
    return (
        f"by up to {gap[worst]:.3g} (element {worst}: {a[worst]:.6g} here, {b[worst]:.6g} there), "
        f"in {int((a != b).sum())} elements"
    )
