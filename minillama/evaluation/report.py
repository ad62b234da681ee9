"""From predictions to a table: accuracy, its standard error, and the majority-class baseline.

Accuracy p of n questions has a standard error of sqrt(p (1 - p) / n). The majority-class baseline
always gives the most common answer; a score near it shows no knowledge.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Record = dict[str, Any]  # what JSON holds: a prediction, a score or a summary

SUBJECTS, GROUPS, TOTAL = range(3)  # the sections of a table, in order


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found. `print` shows its table."""

    summary: Record  # as in summary.json
    table: str
    predictions: list[Record] = field(default_factory=list)  # as in predictions.jsonl

    def __str__(self) -> str:
        return self.table


def score_predictions(records: list[Record]) -> Record:
    """Accuracy of some predictions, its standard error, and the majority-class baseline."""
    n = len(records)
    accuracy = sum(record["gold"] == record["predicted"] for record in records) / n
    answer_counts = Counter(record["gold"] for record in records)
    return {
        "n": n,
        "accuracy": accuracy,
        "stderr": (accuracy * (1 - accuracy) / n) ** 0.5,
        "majority": max(answer_counts.values()) / n,
    }


def summarise(
    records: list[Record], groups: Mapping[str, list[str]], hashes: Mapping[str, str]
) -> Record:
    """The score of all predictions, of each subject and of each group, and the mean over subjects.

    hashes: the sha256 of each subject's file.
    ties: questions for which two choices are best.
    """
    subject_scores = {}
    for subject, sha256 in hashes.items():
        members = [record for record in records if record["subject"] == subject]
        subject_scores[subject] = {**score_predictions(members), "sha256": sha256}
    group_scores = {}
    for group, subjects in groups.items():
        members = [record for record in records if record["subject"] in subjects]
        if members:
            group_scores[group] = score_predictions(members)
    return {
        **score_predictions(records),
        "unweighted": mean_over_subjects(list(subject_scores.values()), len(records)),
        "ties": sum(map(is_tie, records)),
        "groups": group_scores,
        "subjects": subject_scores,
    }


def mean_over_subjects(scores: list[Record], n: int) -> Record:
    """The mean in which each subject counts alike, however many questions it has."""
    variance = sum(score["stderr"] ** 2 for score in scores)
    return {
        "n": n,
        "accuracy": sum(score["accuracy"] for score in scores) / len(scores),
        "stderr": variance**0.5 / len(scores),
        "majority": None,
    }


def is_tie(record: Record) -> bool:
    """Whether the two best choices have the same score."""
    second, first = sorted(record["scores"].values())[-2:]
    return second == first


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    section: int
    name: str
    score: Record
    reference: float | None = None  # accuracy of the same line in another summary

    @property
    def difference(self) -> float:
        return 0.0 if self.reference is None else self.score["accuracy"] - self.reference


def format_table(summary: Record, reference: Record | None = None) -> str:
    """A line for each subject, group and total, then warnings.

    reference: see `references.read_reference`. Its accuracy and the difference become two columns,
    and the largest differences come first.
    """
    header = f"{'subject':44}{'questions':>9}{'accuracy':>10}{'stderr':>9}{'majority':>10}"
    if reference:
        header += f"{'reference':>11}{'difference':>12}"
    lines = [f"{header}  sha256"]
    for row in table_rows(summary, reference):
        lines.append(format_row(row, has_reference=bool(reference)))
    return "\n".join([*lines, *notes(summary)])


def table_rows(summary: Record, reference: Record | None = None) -> list[Row]:
    """The lines of a table, with the accuracies of a reference if there is one."""
    rows = rows_of(summary)
    return add_references(rows, reference) if reference else rows


def rows_of(summary: Record) -> list[Row]:
    """The lines of a table; a summary of another program may lack some."""
    rows = []
    for name, subject_score in summary.get("subjects", {}).items():
        rows.append(Row(SUBJECTS, name, subject_score))
    for name, group_score in summary.get("groups", {}).items():
        rows.append(Row(GROUPS, name, group_score))
    rows.append(Row(TOTAL, "total", summary))
    if summary.get("unweighted"):
        rows.append(Row(TOTAL, "unweighted", summary["unweighted"]))
    return rows


def add_references(rows: list[Row], reference: Record) -> list[Row]:
    """The rows with the accuracies of another summary, the largest differences first."""
    accuracies = {(row.section, row.name): row.score["accuracy"] for row in rows_of(reference)}
    compared = []
    for row in rows:
        accuracy = accuracies.get((row.section, row.name))
        compared.append(replace(row, reference=accuracy))
    return sorted(compared, key=_section_and_difference)


def _section_and_difference(row: Row) -> tuple[int, float]:
    """Sort key: only subjects are sorted by difference."""
    return row.section, -abs(row.difference) if row.section == SUBJECTS else 0.0


def format_row(row: Row, has_reference: bool) -> str:
    score = row.score
    line = f"{row.name:44}{score['n']:>9}{score['accuracy']:>10.2%}{score['stderr']:>9.2%}"
    majority = score["majority"]
    line += f"{'-':>10}" if majority is None else f"{majority:>10.2%}"
    if row.reference is not None:
        line += f"{row.reference:>11.2%}{row.difference:>+12.2%}"
    elif has_reference:
        line += f"{'-':>11}{'-':>12}"
    sha256 = score.get("sha256", "")
    return f"{line}  {sha256[:12]}".rstrip()


def notes(summary: Record) -> list[str]:
    """What a reader of the score must know: ties, prompts that did not fit, a score by chance."""
    lines = []
    if summary["ties"]:
        lines.append(f"{summary['ties']} questions had two best answers: the first was taken")
    shots_dropped = summary["shots_dropped"]
    prompts_cut = summary["prompts_cut"]
    if shots_dropped or prompts_cut:
        lines.append(
            f"to fit {summary['max_length']} tokens: {shots_dropped} shots dropped, "
            f"{prompts_cut} prompts cut in front"
        )
    accuracy = summary["accuracy"]
    stderr = summary["stderr"]
    majority = summary["majority"]
    if abs(accuracy - majority) < 2 * stderr:
        lines.append(
            f"warning: {accuracy:.2%} lies within two standard errors ({stderr:.2%} each) of the "
            f"{majority:.2%} that always giving the most common answer reaches"
        )
    return lines
