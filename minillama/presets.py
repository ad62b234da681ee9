"""Files with the settings of a run: the presets of the package, TOML files, train_config.json."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillama.errors import UserError, closest
from minillama.files import read_json, read_text

PRESETS = Path(__file__).parent / "configs"


def find_source(source: str) -> Path:
    """Return the file of a preset, given by name, or of a path."""
    for path in (PRESETS / f"{source}.toml", Path(source)):
        if path.is_file():
            return path
    known = list_presets()
    hint = closest(source, known)
    raise UserError(f"no preset or file {source!r}{hint}; presets: {', '.join(known)}")


def read_tree(path: Path) -> dict[str, Any]:
    """Return the content of a .toml file or a train_config.json, by dotted names."""
    if path.suffix == ".json":
        return flatten(read_json(path))
    if path.suffix in (".yaml", ".yml"):
        raise UserError(
            f"{path}: YAML is not read; write it as TOML, a `key = value` a line, with text in "
            "quotes, or give the keys as flags"
        )
    try:
        return flatten(tomllib.loads(read_text(path)))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML ({error})") from None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by their dotted names: {"a": {"b": 1}} -> a.b: 1."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= flatten(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def list_presets() -> dict[str, str]:
    """Return what each preset is, by name: the first comment of its file."""
    paths = sorted(PRESETS.glob("*.toml"), key=_demo_first)
    presets = {}
    for path in paths:
        first_line = read_text(path).partition("\n")[0]
        presets[path.stem] = first_line.removeprefix("# ")
    return presets


def _demo_first(path: Path) -> tuple[bool, str]:
    return not path.stem.startswith("demo"), path.stem
