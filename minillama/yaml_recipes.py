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

KEY = re.compile(r"[A-Za-z_][\w-]*")
COMMENT = re.compile(r"(^|[ \t]+)#.*")
NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][-+]?[0-9]+)?")
# A text without quotes that is nothing else in YAML: a name, a path, 7b.
TEXT = re.compile(r"(\.{0,2}/|[1-9][0-9]*)?[^\W\d_][-\w ./,+=@]*")
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
        key, colon, rest = line.rstrip().partition(":")
        is_flat = KEY.fullmatch(key) and colon and rest[:1] in ("", " ", "\t")
        if not is_flat or key in values:
            return None
        try:
            values[key] = _parse_value(rest.strip())
        except ValueError:
            return None
    return {key: value for key, value in values.items() if value is not None}


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
    if text[:1] in ('"', "'"):
        return _parse_quoted(text)
    text = COMMENT.sub("", text).strip()
    if text.startswith("[") and text.endswith("]"):
        parts = [part.strip() for part in text[1:-1].split(",")]
        return [_parse_scalar(part) for part in parts if part]
    return _parse_scalar(text)


def _parse_quoted(text: str) -> str:
    """A text in quotes, without escapes, and a comment behind it."""
    end = text.find(text[0], 1)
    content = text[1:end]
    behind = COMMENT.sub("", text[end + 1 :]).strip()
    if end < 0 or "\\" in content or behind:
        raise ValueError(text)
    return content


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
    if not TEXT.fullmatch(text):
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
