"""The reference of --compare: another run's summary, or accuracies that someone wrote down.

A reference is read and checked before the first question is asked, so that a mistake in it does not
cost an evaluation. These are read:

    summary.json           of a run of eval.py
    take0/summary.json     of Chinese-LLaMA-Alpaca's scripts: percents by subject, fractions of all
    {"anatomy": 0.459, "virology": "43.98%", "total": 0.469}         a JSON list written by hand
    subject,accuracy                                                 the same as CSV, and our own
    anatomy,0.459                                                    summary.csv

An accuracy is a fraction, or a percentage with a percent sign. "45.9" is neither, and is refused.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from minillama.errors import UserError, closest
from minillama.evaluation.options import EvalOptions
from minillama.evaluation.perplexity import METRICS
from minillama.evaluation.protocols import TASKS, Task
from minillama.evaluation.report import Record
from minillama.files import parsing, read_json, read_text

TOTAL_NAMES = ("total", "all")  # of the accuracy over all questions, in a list written by hand


def read_reference(options: EvalOptions) -> Record | None:
    """The reference that the table is printed beside; None without --compare.

    It has the keys of a summary that the table reads; an accuracy that it lacks is None.
    Raises UserError if the file is not a reference of the task.
    """
    if not options.compare:
        return None
    path = Path(options.compare)
    content = read_csv(path) if path.suffix == ".csv" else read_json(path)
    with parsing(path):
        return parse_reference(content, TASKS[options.task])


def parse_reference(content: Record, task: Task) -> Record:
    """The reference that a file holds. The caller adds the file's name to an error."""
    if "task" in content and content["task"] != task.name:
        raise UserError(f"not a summary of --task {task.name}, but of {content['task']!r}")
    if task.name == "perplexity":
        return _metrics(content)
    if "task" in content:
        return _our_summary(content)
    if "All" in content and isinstance(content["All"], dict):
        return _their_summary(content, task)
    return _written_by_hand(content, task)


def read_csv(path: Path) -> Record:
    """The values of a CSV file by name.

    Its columns are `subject` and `accuracy`, among others if it has a header with these names.
    """
    try:
        rows = [row for row in csv.reader(io.StringIO(read_text(path))) if row]
    except csv.Error as error:
        raise UserError(f"{path}: not CSV ({error})") from None
    header = [name.strip().lower() for name in rows[0]] if rows else []
    num_columns = 2
    name_column = 0
    value_column = 1
    if {"subject", "accuracy"} <= set(header):
        num_columns = len(header)
        name_column = header.index("subject")
        value_column = header.index("accuracy")
        rows = rows[1:]
    values = {}
    for row in rows:
        if len(row) != num_columns:
            raise UserError(f"{path}: {','.join(row)!r} has not {num_columns} columns")
        values[row[name_column].strip()] = row[value_column].strip()
    if not values:
        raise UserError(f"{path}: holds no rows; expected subject,accuracy")
    return values


def _metrics(content: Record) -> Record:
    """The reference of a perplexity: at least one of its metrics."""
    metrics = {name: _number(name, content[name]) for name in METRICS if name in content}
    if not metrics:
        raise UserError(f"has none of {', '.join(METRICS)}")
    return metrics


def _our_summary(content: Record) -> Record:
    """A summary.json of ours, of which only the accuracies are kept."""
    reference: Record = {"accuracy": _fraction("accuracy", content["accuracy"])}
    for section in ("subjects", "groups"):
        scores = content.get(section, {})
        reference[section] = _scores({name: scores[name]["accuracy"] for name in scores})
    unweighted = content.get("unweighted")
    if unweighted:
        reference["unweighted"] = {"accuracy": _fraction("unweighted", unweighted["accuracy"])}
    return reference


def _their_summary(content: Record, task: Task) -> Record:
    """A summary.json of Chinese-LLaMA-Alpaca: its subjects have percents, all else fractions."""
    subjects = {}
    for name, score in content.items():
        if name not in ("grouped", "All"):
            subjects[name] = _number(name, score["score"]) / 100
    _check_subjects(subjects, task)
    groups = {name: score["score"] for name, score in content.get("grouped", {}).items()}
    return {
        "accuracy": _fraction("All", content["All"]["score"]),
        "subjects": _scores(subjects),
        "groups": _scores(groups),
    }


def _written_by_hand(content: Record, task: Task) -> Record:
    """Accuracies by subject or group; "total" is that of all questions."""
    subjects = {}
    groups = {}
    total = None
    for name, accuracy in content.items():
        if name.lower() in TOTAL_NAMES:
            total = _fraction(name, accuracy)
        elif name in task.groups:
            groups[name] = accuracy
        elif name != "unweighted":  # a row of our own summary.csv
            subjects[name] = accuracy
    _check_subjects(subjects, task)
    return {"accuracy": total, "subjects": _scores(subjects), "groups": _scores(groups)}


def _check_subjects(names: Iterable[str], task: Task) -> None:
    """Raise UserError for a name that is no subject of the task."""
    known = [subject for subjects in task.groups.values() for subject in subjects]
    known = known or [task.name]
    for name in names:
        if name not in known:
            raise UserError(f"{task.name} has no subject {name!r}{closest(name, known)}")


def _scores(accuracies: Mapping[str, Any]) -> Record:
    return {name: {"accuracy": _fraction(name, value)} for name, value in accuracies.items()}


def _fraction(name: str, value: Any) -> float:
    """An accuracy as a fraction. Raises UserError for one above 1 without a percent sign."""
    if isinstance(value, str) and value.endswith("%"):
        fraction = _number(name, value.removesuffix("%")) / 100
    else:
        fraction = _number(name, value)
    if not 0 <= fraction <= 1:
        raise UserError(
            f"the accuracy of {name} is {value}; write a fraction such as 0.459, or 45.9%"
        )
    return fraction


def _number(name: str, value: Any) -> float:
    """A finite number, of JSON or as the text of a CSV field."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise UserError(f"{name} is {value!r}; expected a number")
    return number
