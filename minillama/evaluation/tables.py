"""From predictions to a table: accuracy, how sure it is, and what answering without thinking would give.

    accuracy p of n questions has a standard error of sqrt(p (1 - p) / n); the majority baseline always gives the most common answer.
"""

from collections import Counter
from typing import Any

from minillama.evaluation.subjects import GROUPS

Row = dict[str, Any]


def row(records: list[Row]) -> Row:
    """n, accuracy, stderr and majority of some predictions."""
    n = len(records)
    p = sum(r["gold"] == r["predicted"] for r in records) / n
    return {"n": n, "accuracy": p, "stderr": (p * (1 - p) / n) ** 0.5, "majority": max(Counter(r["gold"] for r in records).values()) / n}


def summarise(task: str, records: list[Row]) -> Row:
    """The whole, the unweighted mean over subjects, `groups` and `subjects`, and how many questions had two best answers."""
    names = dict.fromkeys(r["subject"] for r in records)
    subjects = {name: row([r for r in records if r["subject"] == name]) for name in names}
    members = {group: [r for r in records if r["subject"] in known] for group, known in GROUPS.get(task, {}).items()}
    best = [sorted(r["scores"].values())[-2:] for r in records]
    mean = {"n": len(records), "accuracy": sum(s["accuracy"] for s in subjects.values()) / len(subjects),
            "stderr": sum(s["stderr"] ** 2 for s in subjects.values()) ** 0.5 / len(subjects), "majority": None}
    return {**row(records), "unweighted": mean, "ties": sum(a == b for a, b in best),
            "groups": {group: row(inside) for group, inside in members.items() if inside}, "subjects": subjects}


def table(summary: Row, reference: Row | None = None) -> str:
    """A line for each subject, group and total; with a reference, its accuracy and the difference, the largest difference first."""
    def difference(section: str, name: str, here: Row) -> float | None:
        there = (reference or {}).get(section, {}).get(name)
        return here["accuracy"] - there["accuracy"] if there else None

    subjects = [("subjects", name, one) for name, one in summary["subjects"].items()]
    if reference:
        subjects.sort(key=lambda s: -abs(difference(*s) or 0.0))
    total = {"total": summary, "unweighted": summary["unweighted"]}
    if reference:
        reference = {**reference, "total": {"total": reference, "unweighted": reference.get("unweighted")}}
    lines = [f"{'subject':44}{'questions':>9}{'accuracy':>10}{'stderr':>9}{'majority':>10}"
             + (f"{'reference':>11}{'difference':>12}" if reference else "") + "  sha256"]
    for section, name, one in [*subjects, *(("groups", *g) for g in summary["groups"].items()), *(("total", *t) for t in total.items())]:
        gap = difference(section, name, one)
        compared = "" if not reference else f"{'-':>11}{'-':>12}" if gap is None else f"{one['accuracy'] - gap:>11.2%}{gap:>+12.2%}"
        majority = "-" if one["majority"] is None else f"{one['majority']:.2%}"
        lines.append(f"{name:44}{one['n']:>9}{one['accuracy']:>10.2%}{one['stderr']:>9.2%}{majority:>10}{compared}"
                     f"  {one.get('sha256', '')[:12]}".rstrip())
    return "\n".join(lines)


def doubt(summary: Row) -> str:
    """A warning where the accuracy could as well be the baseline's."""
    if abs(summary["accuracy"] - summary["majority"]) >= 2 * summary["stderr"]:
        return ""
    return (f"warning: {summary['accuracy']:.2%} lies within two standard errors ({summary['stderr']:.2%} each) of {summary['majority']:.2%}, "
            "which always giving the most common answer would reach")
