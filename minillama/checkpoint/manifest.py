"""manifest.json of a finished model: is every file what was written?

    {"files": {"config.json": {"bytes": …, "mtime_ns": …, "sha256": …}, …}}

A flipped bit in a config or in weights gives another model, and nothing else tells. The manifest is
written last. Whoever opens the directory compares sizes and the sha256 of small files. A large file
is hashed only if its time is another than the recorded one, as that of a copy is. All are hashed by
`convert.py sha256 DIR --check DIR/manifest.json`. Checkpoints have a manifest of hashes alone
(train_state.py); the large files of their optimizer state are not needed here, and not read.
"""

from pathlib import Path
from typing import Any

from minillama.errors import UserError
from minillama.files import read_json, sha256_of, write_json

MANIFEST = "manifest.json"
SMALL = 2**20  # bytes of a file that is always hashed
OPTIMIZER_STATE = "state-"  # how its files begin


def describe_file(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    status = path.stat()
    return {
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sha256": sha256_of(path),
    }


def write_manifest(directory: Path) -> None:
    """Write manifest.json for the files of a directory."""
    files = {}
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.name != MANIFEST:
            files[path.name] = describe_file(path)
    write_json(directory / MANIFEST, {"files": files})


def refuse_damage(directory: Path) -> None:
    """Raise UserError if a file is another than manifest.json says, where there is one."""
    path = directory / MANIFEST
    if not path.is_file():
        return
    content = read_json(path)
    hashes = content.get("sha256")
    files = content.get("files")
    if isinstance(hashes, dict):
        files = {name: {"sha256": sha256} for name, sha256 in hashes.items()}
    if not isinstance(files, dict):
        return  # of another program
    for name, recorded in files.items():
        if name.startswith(OPTIMIZER_STATE):
            continue
        if not isinstance(recorded, dict) or not _is_as_recorded(directory / name, recorded):
            raise UserError(
                f"{directory / name}: not the file that {MANIFEST} was written for; restore it, "
                f"or delete {path} if it was changed on purpose"
            )


def _is_as_recorded(path: Path, recorded: dict[str, Any]) -> bool:
    if not path.is_file():
        return False
    status = path.stat()
    if recorded.get("bytes", status.st_size) != status.st_size:
        return False
    if status.st_size > SMALL and recorded.get("mtime_ns") == status.st_mtime_ns:
        return True
    return sha256_of(path) == recorded.get("sha256")
