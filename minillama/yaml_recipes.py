"""A recipe in YAML, as LLaMA-Factory has them: what to write in TOML instead.

YAML is a large language, and this program has no parser for it. Recipes use a small part of it,
which can be translated with certainty: a key and a value a line.

    ### model                                       ckpt = "llama-7b"
    model_name_or_path: llama-7b                    learning_rate = 0.0001
    learning_rate: 1.0e-4
    stage: sft  # no key of ours                    as a flag: --stage sft

Anything else, such as a key in a key or a text of several lines, is not translated at all.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

LINE = re.compile(r"(?P<key>[A-Za-z_][\w-]*):(?:[ \t]+(?P<value>.*))?")
QUOTED = re.compile(r"(?P<text>\"[^\"\\]*\"|'[^']*')(?:[ \t]+#.*)?")
LIST = re.compile(r"\[(?P<items>[^\[\]{}\"'#]*)\](?:[ \t]+#.*)?")
COMMENT = re.compile(r"(^|[ \t]+)#.*")
NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][-+]?[0-9]+)?")
# What YAML may take for a number of another kind, or a date.
DIGITS = re.compile(
    r"[-+]?\.?[0-9][-+0-9_:.tTzZ ]*|[-+]?0[xXoObB].*|[-+]?\.(inf|Inf|INF|nan|NaN|NAN)"
)
NO_SCALAR = re.compile(r"[\[\]{}&*!|>%@`,?=<\"'-]|.*:(\s|$)")  # how a value of another kind begins
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOTHING = ("", "~", "null", "Null", "NULL")


def read_flat_yaml(text: str) -> dict[str, Any] | None:
    """Return the values of a flat file; None if a part of it is not understood for certain.

    A key without a value is left out.
    """
    values: dict[str, Any] = {}
    for line in text.splitlines():
        if COMMENT.sub("", line).strip() in ("", "---"):
            continue
        match = LINE.fullmatch(line.rstrip())
        if match is None or match["key"] in values:
            return None
        try:
            value = _parse_value((match["value"] or "").strip())
        except ValueError:
            return None
        if value is not None:
            values[match["key"]] = value
    return values


def advice(path: Path, text: str, renamed: Mapping[str, str], keys: Collection[str]) -> str:
    """Return what to do with a recipe in YAML: the end of an error.

    renamed: other systems' names of our keys. keys: our keys.
    """
    values = read_flat_yaml(text)
    if values is None:
        return (
            "write it as TOML, a `key = value` a line, with text in quotes, or give the keys as "
            "flags"
        )
    lines = []
    flags = []
    for name, value in values.items():
        key = renamed.get(name, name)
        if key in keys:
            lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
        else:
            flags.append(f"--{name} {_as_word(value)}")
    content = "\n".join(lines)
    parts = [f"write this into {path.with_suffix('.toml')}, and give that:\n{content}"]
    if flags:
        parts.append(f"these are no keys; give them as flags: {' '.join(flags)}")
    return "\n".join(parts)


def _parse_value(text: str) -> Any:
    """The value of a line; None for none. Raises ValueError for what is not understood."""
    quoted = QUOTED.fullmatch(text)
    if quoted is not None:
        return quoted["text"][1:-1]
    items = LIST.fullmatch(text)
    if items is not None:
        parts = items["items"].split(",")
        return [_parse_scalar(part.strip()) for part in parts if part.strip()]
    return _parse_scalar(COMMENT.sub("", text).strip())


def _parse_scalar(text: str) -> Any:
    """A value without quotes: true or false, a number, or a text."""
    if text in NOTHING:
        return None
    if text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    number = NUMBER.fullmatch(text)
    if number is not None:
        is_whole = number[2] is None and number[3] is None
        return int(text) if is_whole else float(text)
    if DIGITS.fullmatch(text) or NO_SCALAR.match(text):
        raise ValueError(text)
    return text


def _as_word(value: Any) -> str:
    """A value as it is typed behind a flag."""
    if isinstance(value, list):
        return ",".join(map(_as_word, value))
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return json.dumps(text) if re.search(r"[^\w./:,-]", text) else text
