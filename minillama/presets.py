"""From presets, files and flags to the settings of a run.

default  <  preset, TOML file or train_config.json (--config)  <  flag     the later one wins
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillama.errors import UserError, closest
from minillama.files import read_json, read_text
from minillama.ignored_keys import (
    ADAPTER_KEYS,
    FROM_FILE,
    FROM_FLAG,
    FROM_RUN,
    refuse_ignored,
)
from minillama.train_config import KEYS, PRECISIONS, TrainConfig, parse_list
from minillama.yaml_recipes import advice

PRESETS = Path(__file__).parent / "configs"


def resolve(
    source: str, flags: Mapping[str, Any], renamed: Mapping[str, str] | None = None
) -> TrainConfig:
    """Return the settings of a run: the defaults, then `source`, then the flags.

    source: the name of a preset, a .toml file, a run's train_config.json, or "".
    flags: values by key; --fp16 and --bf16 too; names that are no key are left out.
    renamed: other names for keys, which a file may use.
    """
    of_source = read_source(source, renamed or {}) if source else {}
    of_flags = {name: value for name, value in flags.items() if name in KEYS}
    if "adapter" in of_flags:
        of_source = {name: of_source[name] for name in of_source if name not in ADAPTER_KEYS}
    level = FROM_RUN if Path(source).name == "train_config.json" else FROM_FILE
    levels = dict.fromkeys(of_source, level) | dict.fromkeys(of_flags, FROM_FLAG)
    values = of_source | of_flags
    if any(KEYS[name].section == "lora" for name in values):
        values.setdefault("lora", True)
    values["precision"] = _precision(values, flags)
    if source and not values.get("out_dir"):
        values["out_dir"] = f"runs/{Path(source).stem}"
    where = source or "command line"
    typed = {name: _typed(name, value, where) for name, value in values.items()}
    config = TrainConfig(**typed)
    refuse_ignored(config, levels)
    return config


def _precision(values: Mapping[str, Any], flags: Mapping[str, Any]) -> str:
    """Return the precision by --fp16 or --bf16, else by the key, which may have torch's name."""
    switches = [name for name in ("fp16", "bf16") if flags.get(name)]
    if len(switches) == 2:
        raise UserError("--fp16 and --bf16 exclude each other; give one")
    if switches:
        return switches[0]
    precision = values.get("precision", "fp32")
    return PRECISIONS.get(str(precision), precision)


def read_source(source: str, renamed: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of a preset (by name), of a .toml file or of a train_config.json."""
    path = find_source(source)
    if path.suffix in (".yaml", ".yml"):
        remedy = advice(path, read_text(path), renamed, KEYS)
        raise UserError(f"{path}: YAML is not read; {remedy}")
    values: dict[str, Any] = {}
    for dotted, value in read_tree(path).items():
        section, _, name = dotted.rpartition(".")
        where = f"{path}: [{section}] {name}" if section else f"{path}: {name}"
        target = renamed.get(name, name)
        if target not in KEYS:
            hint = closest(name, KEYS)
            raise UserError(f"{where}: unknown key{hint}; `train.py --help` lists every key")
        if section not in ("", KEYS[target].section):
            raise UserError(f"{where}: this key belongs to section [{KEYS[target].section}]")
        if target in values:
            raise UserError(f"{where}: the file has a value for {target} already; leave one out")
        values[target] = value
    return values


def _typed(name: str, value: Any, where: str) -> Any:
    """Return `value` with the type of its key. Raises UserError if it has another one."""
    expected = type(KEYS[name].default)
    if expected is float and type(value) is int:
        return float(value)
    if expected is tuple and isinstance(value, str):
        return parse_list(value)
    if expected is tuple and _is_list_of_strings(value):
        return tuple(value)
    if type(value) is not expected:
        found = type(value).__name__
        raise UserError(f"{where}: {name} = {value!r}: expected {expected.__name__}, found {found}")
    return value


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


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
