"""Chat templates that a published model brings with it: recognised, and never run.

They are programs in the language Jinja, in tokenizer_config.json or chat_template.jinja. A program
of a stranger is not run here. What it writes is told by a mark, and the template of this package
that writes the same is named.
"""

import json
from pathlib import Path

from minillama import chat
from minillama.files import read_json, read_text

# What only a chat template of this layout has in its text.
MARKS = {
    "llama3": "<|start_header_id|>",
    "llama2": "<<SYS>>",
    "alpaca": "### Instruction:",
    "vicuna_v1.1": "USER: ",
}


def own_chat_template(directory: Path) -> str:
    """The text of a model's chat template, or ""."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return read_text(path)
    config = directory / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.is_file() else ""
    if not template:
        return ""
    return template if isinstance(template, str) else json.dumps(template)  # a list of several


def same_layout(chat_template: str) -> str:
    """The template of this package with the layout of a chat template, or ""."""
    names = (name for name, mark in MARKS.items() if mark in chat_template)
    return next(names, "")


def missing_template_note(directory: Path) -> str:
    """What to do about a conversation without a template. directory: the tokenizer's."""
    chat_template = own_chat_template(directory)
    if not chat_template:
        return (
            "note: no chat template is known for this checkpoint, so it only continues text; "
            "choose one with --template NAME"
        )
    name = same_layout(chat_template)
    if name:
        remedy = f"its layout is that of --template {name}: add that flag"
    else:
        known = ", ".join(chat.TEMPLATES)
        remedy = f"its layout is none of this package's, which are {known} (--template NAME)"
    return (
        "note: this checkpoint has a chat template of its own, which is not run, so it only "
        f"continues text; {remedy}"
    )
