"""Tasks and protocols: what can be scored, how, and from which files. `tasks.toml` holds the data.

A protocol is everything that turns a question into a number: the prompt, the solved examples
(shots) before it, which tokens are scored, and which choice wins.

    prompt     header · shot · shot · … · question          all of it inside `around`
    choices    the texts whose likelihood is computed behind the prompt
    rule       which of them is the model's answer
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillama.errors import UserError, closest

Question = dict[str, str]  # the fields that a protocol's texts are formatted with

LETTERS = ("A", "B", "C", "D")
LETTER_CHOICES = {letter: f" {letter}" for letter in LETTERS}


@dataclass(frozen=True)
class Protocol:
    """How a task's questions are asked and answered. The head of tasks.toml explains the keys."""

    question: str
    choices: dict[str, str] = field(default_factory=LETTER_CHOICES.copy)  # answer -> its text
    rule: str = "likelihood"
    header: str = ""
    header_needs_shots: bool = False
    shot: str = ""
    n_shots: int = 0
    around: str = "{}"
    patterns: Sequence[str] = ()

    def prompt(self, question: Question, shots: list[Question]) -> str:
        """The prompt of a question, with solved examples before it."""
        parts = [self.shot.format(**shot) for shot in shots]
        parts.append(self.question.format(**question))
        if shots or not self.header_needs_shots:
            parts.insert(0, self.header.format(**question))
        return self.around.format("".join(parts))


@dataclass(frozen=True)
class Task:
    """A table of tasks.toml. `files` and `shots` are paths below --data; {} is the subject."""

    name: str
    about: str
    layout: str  # which files it reads, in words
    command: str  # the flags it needs, with examples
    published: str = ""  # where its files are published
    split: str = ""
    files: str = ""  # the questions
    shots: str = ""  # the solved examples
    header: bool = False  # whether CSV files begin with the names of their columns
    columns: Sequence[str] = ()  # the fields that a question must have
    answers: Sequence[str] = ()
    protocols: dict[str, Protocol] = field(default_factory=dict)  # the first is the default
    groups: dict[str, list[str]] = field(default_factory=dict)  # group -> its subjects
    unused: Sequence[str] = ()  # options that have no meaning for it

    @property
    def required(self) -> list[str]:
        """The options that must be given."""
        return [name for name in ("ckpt", "data", "compare") if f"--{name}" in self.command]


@dataclass(frozen=True)
class Setup:
    """Which protocol is in use. A score has a meaning only together with it."""

    protocol: str
    n_shots: int
    split: str


def find_protocol(task: Task, name: str) -> str:
    """The name of a protocol of the task; "" gives the default.

    Raises UserError, with the closest name, if there is none.
    """
    known = task.protocols
    name = name or next(iter(known))
    if name not in known:
        raise UserError(
            f"{task.name} has no protocol {name!r}{closest(name, known)}; "
            f"protocols: {', '.join(known)}"
        )
    return name


def read_tasks() -> dict[str, Task]:
    """The tasks of tasks.toml, by name."""
    path = Path(__file__).with_name("tasks.toml")
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    return {name: _parse_task(name, table) for name, table in tables.items()}


def _parse_task(name: str, table: dict[str, Any]) -> Task:
    protocols = {}
    for protocol_name, keys in table.pop("protocols", {}).items():
        protocols[protocol_name] = Protocol(**keys)
    groups = {}
    for group, subjects in table.pop("groups", {}).items():
        groups[group] = subjects.split()
    return Task(name, protocols=protocols, groups=groups, **table)


TASKS = read_tasks()
