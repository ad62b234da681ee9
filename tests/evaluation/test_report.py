"""Tables: accuracy, standard error and the majority-class baseline, worked by hand."""

import pytest

from minillama.evaluation import report
from minillama.evaluation.protocols import TASKS

SUBJECTS = ("anatomy", "astronomy", "virology")
FITTING = {"max_length": 9, "shots_dropped": 0, "prompts_cut": 0}  # all prompts fitted


def predictions(subject: str, num_right: int, num_wrong: int) -> list[dict]:
    """Three of four answers are A, the others B. The first `num_right` predictions are right."""
    records = []
    for i in range(num_right + num_wrong):
        gold = "A" if i % 4 else "B"
        records.append(
            {
                "subject": subject,
                "gold": gold,
                "predicted": gold if i < num_right else "C",
                "scores": {"A": 0.0, "B": -1.0},
            }
        )
    return records


def test_a_table_worked_by_hand() -> None:
    summary = report.summarise(
        predictions("anatomy", 3, 1) + predictions("astronomy", 6, 10),
        {"STEM": ["astronomy"], "Other": ["anatomy"], "None": ["law"]},
        {"anatomy": "a" * 64, "astronomy": "b" * 64},
    )
    assert summary["n"] == 20
    assert summary["accuracy"] == 9 / 20
    assert summary["majority"] == 15 / 20
    assert summary["stderr"] == pytest.approx((0.45 * 0.55 / 20) ** 0.5)
    assert summary["unweighted"]["accuracy"] == (3 / 4 + 6 / 16) / 2
    variances = 0.75 * 0.25 / 4, 0.375 * 0.625 / 16  # of anatomy's and astronomy's accuracy
    assert summary["unweighted"]["stderr"] == pytest.approx(sum(variances) ** 0.5 / 2)
    assert summary["subjects"]["anatomy"] == {
        "n": 4,
        "accuracy": 0.75,
        "stderr": (0.75 * 0.25 / 4) ** 0.5,
        "majority": 0.75,
        "sha256": "a" * 64,
    }
    assert summary["groups"].keys() == {"STEM", "Other"}
    assert summary["groups"]["STEM"]["accuracy"] == 6 / 16

    table = report.format_table({**summary, "max_length": 9, "shots_dropped": 2, "prompts_cut": 1})
    lines = table.splitlines()
    names = [line.split()[0] for line in lines[1:7]]
    assert names == ["anatomy", "astronomy", "STEM", "Other", "total", "unweighted"]
    assert lines[1].split() == ["anatomy", "4", "75.00%", "21.65%", "75.00%", "a" * 12]
    assert "2 shots dropped, 1 prompts cut" in lines[7]


@pytest.mark.parametrize(
    ("num_right", "is_warned"), [(75, True), (68, True), (60, False), (95, False)]
)
def test_a_score_near_the_baseline_is_warned_about(num_right: int, is_warned: bool) -> None:
    """Of 100 answers 75 are A; two standard errors are some 9 %."""
    records = predictions("anatomy", num_right, 100 - num_right)
    summary = report.summarise(records, {}, {"anatomy": ""})
    assert ("warning" in report.format_table({**summary, **FITTING})) == is_warned


def test_compared_subjects_are_sorted_by_their_difference() -> None:
    def summary(*num_right: int) -> dict:
        records = []
        for subject, n in zip(SUBJECTS, num_right, strict=True):
            records += predictions(subject, n, 10 - n)
        return {**report.summarise(records, {}, dict.fromkeys(SUBJECTS, "")), **FITTING}

    table = report.format_table(summary(5, 9, 5), reference=summary(4, 5, 8))
    lines = [line.split() for line in table.splitlines()]
    assert lines[0][-3:-1] == ["reference", "difference"]
    assert [(line[0], *line[5:7]) for line in lines[1:4]] == [
        ("astronomy", "50.00%", "+40.00%"),
        ("virology", "80.00%", "-30.00%"),
        ("anatomy", "40.00%", "+10.00%"),
    ]
    assert lines[4][0] == "total"
    assert lines[4][-1] == "+6.67%"


@pytest.mark.parametrize(
    ("task", "sizes"),
    [("mmlu", [18, 13, 12, 14]), ("ceval", [20, 10, 11, 11]), ("cmmlu", [17, 11, 13, 11, 15])],
)
def test_groups_are_the_published_ones_and_no_subject_is_in_two(
    task: str, sizes: list[int]
) -> None:
    groups = list(TASKS[task].groups.values())
    assert [len(group) for group in groups] == sizes
    assert len(set().union(*groups)) == sum(sizes)
