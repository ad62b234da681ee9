"""Which prompt template a checkpoint was tuned with, and where it says so.

    minillama.json           "template": a name, or "chat_template.jinja"; train.py writes it
    chat_template.jinja      the text of a chat template
    tokenizer_config.json    "chat_template": a text, or several with names; `default` counts

The first that is there counts, as in transformers. chat_template.jinja is also where a run writes
the chat template that it was tuned with, so that the template travels with the model. This module
imports no torch.
"""

from pathlib import Path
from typing import Any

from minillama import chat
from minillama.errors import UserError
from minillama.files import parsing, read_json, read_text, write_text

JINJA_FILE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"
MAX_BYTES = 2**20  # of a chat template; published ones have up to 20,000


def read_about(directory: Path) -> dict[str, Any]:
    """Return minillama.json: the template and what made the model; {} if there is none."""
    path = directory / "minillama.json"
    return read_json(path) if path.is_file() else {}


def read_template(directory: Path) -> str:
    """The template that a model or adapter was tuned with: a name or a text; "" for none known.

    Raises UserError for a file that says something else.
    """
    about = read_about(directory)
    if "template" not in about:
        return read_chat_template(directory)
    template = about["template"] or ""
    if not isinstance(template, str):
        raise UserError(
            f"{directory / 'minillama.json'}: template is {template!r}, expected a name"
        )
    if template == JINJA_FILE:
        return read_jinja(directory / JINJA_FILE)
    if template:
        with parsing(directory / "minillama.json"):
            chat.find_template(template)
    return template


def read_chat_template(directory: Path) -> str:
    """The text of the chat template in a tokenizer's files, or ""."""
    if (directory / JINJA_FILE).exists():
        return read_jinja(directory / JINJA_FILE)
    path = directory / CONFIG
    if not path.is_file():
        return ""
    with parsing(path):
        template = _default_of(read_json(path).get("chat_template")) or ""
        if template and not chat.is_jinja(template):
            raise UserError(f"chat_template = {template[:40]!r}: no Jinja in it")
    return template


def _default_of(value: Any) -> Any:
    """The template of a chat_template entry, which may be a list of several with names."""
    if isinstance(value, list):
        named = {entry["name"]: entry["template"] for entry in value}
        if "default" not in named:
            raise UserError(
                f"chat_template has {', '.join(map(str, named))} and no default; choose one: write "
                f"it into {JINJA_FILE}, or give it with --template FILE.jinja"
            )
        value = named["default"]
    if value is not None and not isinstance(value, str):
        raise UserError(f"chat_template is {type(value).__name__}, expected a text")
    return value


def read_jinja(path: Path) -> str:
    """The text of a file with a chat template."""
    text = read_text(path, max_bytes=MAX_BYTES)
    if not chat.is_jinja(text):
        raise UserError(f"{path}: holds no chat template in Jinja")
    return text


def resolve_template(name: str) -> str:
    """What --template means: the text of FILE.jinja, else the name, which must be known."""
    if name.endswith(".jinja"):
        return read_jinja(Path(name))
    if name not in ("", "none") and not chat.is_jinja(name):
        chat.find_template(name)
    return name


def write_template(directory: Path, template: str) -> str:
    """Write a chat template into a model directory. Returns the entry of minillama.json."""
    if not chat.is_jinja(template):
        return template
    write_text(directory / JINJA_FILE, template)
    return JINJA_FILE
