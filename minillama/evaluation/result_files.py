"""Further files of a run with --out, for people and programs that do not read ours.

--csv              summary.csv: the table; predictions.csv: a row for each question
ceval, cmmlu       take0/summary.json and take0/submission.json, as Chinese-LLaMA-Alpaca's
                   scripts write them: a subject's score is a percentage there, that of a group
                   and of all questions is a fraction
"""

import json
from pathlib import Path
from typing import Any

from minillama.evaluation.options import EvalOptions
from minillama.evaluation.report import Record, table_rows
from minillama.files import write_csv, write_json, write_text

TAKE_TASKS = ("ceval", "cmmlu")
TABLE_COLUMNS = ("subject", "questions", "accuracy", "stderr", "majority")
REFERENCE_COLUMNS = ("reference", "difference")
PREDICTION_COLUMNS = ("id", "subject", "gold", "predicted", "correct")


def write_results(
    options: EvalOptions, summary: Record, reference: Record | None, records: list[Record]
) -> None:
    """Write what the task and the options ask for, below options.out."""
    out = Path(options.out)
    if options.csv:
        write_table(out / "summary.csv", summary, reference)
        write_predictions(out / "predictions.csv", records)
    if options.task in TAKE_TASKS:
        write_json(out / "take0/summary.json", take_summary(summary))
        text = json.dumps(submission(records), indent=4, ensure_ascii=False)
        write_text(out / "take0/submission.json", f"{text}\n")


def write_table(path: Path, summary: Record, reference: Record | None) -> None:
    """Write the lines of the printed table; without a reference its two columns are absent."""
    columns: tuple[str, ...] = TABLE_COLUMNS
    if reference:
        columns += REFERENCE_COLUMNS
    lines = []
    for row in table_rows(summary, reference):
        score = row.score
        line = [row.name, score["n"], score["accuracy"], score["stderr"], score["majority"]]
        if row.reference is not None:
            line += [row.reference, row.difference]
        elif reference:
            line += [None, None]
        lines.append(line)
    write_csv(path, columns, lines)


def write_predictions(path: Path, records: list[Record]) -> None:
    """Write the answers, and the score of each choice in a column of its own."""
    choices = list(records[0]["scores"])
    lines = []
    for record in records:
        is_correct = int(record["gold"] == record["predicted"])
        line = [record["id"], record["subject"], record["gold"], record["predicted"], is_correct]
        line += [record["scores"][choice] for choice in choices]
        lines.append(line)
    write_csv(path, [*PREDICTION_COLUMNS, *choices], lines)


def take_summary(summary: Record) -> Record:
    """The scores in the layout of take0/summary.json."""
    content: Record = {}
    for subject, score in summary["subjects"].items():
        content[subject] = {
            "score": 100 * score["accuracy"],
            "num": score["n"],
            "correct": _num_correct(score),
        }
    grouped = {}
    for group, score in summary["groups"].items():
        grouped[group] = {
            "correct": _num_correct(score),
            "num": score["n"],
            "score": score["accuracy"],
        }
    content["grouped"] = grouped
    content["All"] = {
        "score": summary["accuracy"],
        "num": summary["n"],
        "correct": _num_correct(summary),
    }
    return content


def _num_correct(score: Record) -> int:
    return round(score["accuracy"] * score["n"])


def submission(records: list[Record]) -> dict[str, dict[str, Any]]:
    """The answers by subject and by the question's number: {"law": {"0": "A", "1": "C"}}."""
    answers: dict[str, dict[str, Any]] = {}
    for record in records:
        number = record["id"].rpartition("/")[2]
        answers.setdefault(record["subject"], {})[number] = record["predicted"]
    return answers
