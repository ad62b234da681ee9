"""From predictions to a table: accuracy, how sure it is, and what answering without thinking would give.

accuracy p of n questions has a standard error of sqrt(p (1 - p) / n); the majority baseline always gives the most common answer.
"""

from collections import Counter

from minillama.generation.output_file import Record


def row(records: list[Record]) -> Record:
    """n, accuracy, stderr and majority of some predictions."""
    n, p = len(records), sum(r["gold"] == r["predicted"] for r in records) / len(records)
    return {
        "n": n,
        "accuracy": p,
        "stderr": (p * (1 - p) / n) ** 0.5,
        "majority": max(Counter(r["gold"] for r in records).values()) / n,
    }


def summarise(records: list[Record], groups: dict[str, str], hashes: dict[str, str]) -> Record:
    """The whole, its mean over subjects, groups and subjects, and how many questions had two best answers."""
    subjects = {
        name: row([r for r in records if r["subject"] == name]) | {"sha256": hashes[name]}
        for name in hashes
    }
    inside = {
        group: [r for r in records if r["subject"] in names.split()]
        for group, names in groups.items()
    }
    means = {
        "accuracy": sum(s["accuracy"] for s in subjects.values()) / len(subjects),
        "stderr": sum(s["stderr"] ** 2 for s in subjects.values()) ** 0.5 / len(subjects),
    }
    best = [sorted(r["scores"].values())[-2:] for r in records]
    return {
        **row(records),
        "unweighted": {"n": len(records), **means, "majority": None},
        "ties": sum(a == b for a, b in best),
        "groups": {group: row(some) for group, some in inside.items() if some},
        "subjects": subjects,
    }


def table(summary: Record, reference: Record | None = None) -> str:
    """A line for each subject, group and total, and what to beware of. With a reference its accuracy and the difference stand beside,
    and subjects are in order of the difference's size."""
    here, there = (_rows(s) if s else {} for s in (summary, reference))
    gaps = {
        key: one["accuracy"] - there[key]["accuracy"] for key, one in here.items() if key in there
    }
    if reference:
        here = dict(
            sorted(
                here.items(),
                key=lambda item: (
                    item[0][0],
                    -abs(gaps.get(item[0], 0.0)) if item[0][0] == 0 else 0,
                ),
            )
        )
    lines = [
        f"{'subject':44}{'questions':>9}{'accuracy':>10}{'stderr':>9}{'majority':>10}"
        + (f"{'reference':>11}{'difference':>12}" if reference else "")
        + "  sha256"
    ]
    for key, one in here.items():
        compared = (
            f"{one['accuracy'] - gaps[key]:>11.2%}{gaps[key]:>+12.2%}"
            if key in gaps
            else f"{'-':>11}{'-':>12}"
            if reference
            else ""
        )
        majority = "-" if one["majority"] is None else f"{one['majority']:.2%}"
        lines.append(
            f"{key[1]:44}{one['n']:>9}{one['accuracy']:>10.2%}{one['stderr']:>9.2%}{majority:>10}{compared}"
            f"  {one.get('sha256', '')[:12]}".rstrip()
        )
    return "\n".join([*lines, *_notes(summary)])


def _rows(summary: Record) -> dict[tuple[int, str], Record]:
    """The lines of a table, by section and name."""
    sections = (
        summary.get("subjects", {}),
        summary.get("groups", {}),
        {"total": summary, "unweighted": summary.get("unweighted")},
    )
    return {
        (number, name): one
        for number, section in enumerate(sections)
        for name, one in section.items()
        if one
    }


def _notes(summary: Record) -> list[str]:
    p, e, m, dropped, cut = (
        summary[name] for name in ("accuracy", "stderr", "majority", "shots_dropped", "prompts_cut")
    )
    notes = (
        [f"{summary['ties']} questions had two best answers: the first was taken"]
        if summary["ties"]
        else []
    )
    notes += (
        [
            f"to fit {summary['max_length']} tokens: {dropped} shots dropped, {cut} prompts cut in front"
        ]
        if dropped + cut
        else []
    )
    return notes + (
        [
            f"warning: {p:.2%} lies within two standard errors ({e:.2%} each) of the {m:.2%} that always giving the most common "
            "answer reaches"
        ]
        if abs(p - m) < 2 * e
        else []
    )
