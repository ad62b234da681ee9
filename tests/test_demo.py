"""The embedded demo: data that the package makes itself, and README's first three commands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minillama.data import demo
from minillama.loss_curves import read_metrics

ROOT = Path(__file__).parents[1]
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
POSITIONS = {"first": 0, "second": 1, "third": 2, "last": -1}


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """`python train.py`, stopped after five steps."""
    out = tmp_path_factory.mktemp("runs") / "demo"
    return out, run("train.py", "--max_steps", "5", "--logging_steps", "1", "--out_dir", str(out))


def solve(question: str) -> str:
    """The answer, by other means than the generator's."""
    if question.startswith("Which number"):
        return max(re.findall(r"\d+", question), key=int)
    words = [word for word in re.findall(r"\b[a-z]+\b", question) if word in demo.WORDS]
    if question.startswith("Please repeat"):
        return question.removeprefix("Please repeat ").removesuffix(".")
    if question.startswith("How many"):
        return NUMBERS[len(words)]
    return words[POSITIONS[re.search(r"the (\w+) word", question)[1]]]


@pytest.mark.parametrize("held_out", [False, True], ids=["training", "held out"])
def test_every_answer_follows_from_its_question(held_out: bool) -> None:
    for record in demo.records(tuple(demo.KINDS), 500, seed=1, held_out=held_out):
        assert record["output"] == solve(record["instruction"]), record


@pytest.mark.parametrize("name", ["demo", "demo_lora"])
def test_no_held_out_prompt_is_ever_trained_on(name: str, tmp_path: Path) -> None:
    """Not in any round of a conversation, for any seed: the hash of a prompt decides its side."""
    data, _ = demo.write_demo(name, tmp_path)
    records = json.loads(data.read_text())
    trained = {r["instruction"] for r in records} | {
        question for r in records for question, _ in r["history"]
    }
    held_out = {
        r["instruction"]
        for seed in (1, 2)
        for r in demo.records(tuple(demo.KINDS), 600, seed, held_out=True)
    }
    assert len(trained) > 5_000
    assert not trained & held_out
    assert not any(demo.is_held_out(prompt) for prompt in trained)


def test_held_out_prompts_are_distinct() -> None:
    prompts = [r["instruction"] for r in demo.records(demo.DEMO, 300, seed=1, held_out=True)]
    assert len(set(prompts)) == 300


def test_the_data_follows_the_seed_to_the_byte(tmp_path: Path) -> None:
    first, again = (demo.write_demo("demo_lora", tmp_path / name) for name in ("first", "again"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert demo.records(demo.DEMO, 50, 0, False) != demo.records(demo.DEMO, 50, 1, False)


def test_unchanged_data_is_not_written_again(tmp_path: Path) -> None:
    """Its time is part of the cache's key: a second start would tokenize everything anew."""
    files = demo.write_demo("demo_lora", tmp_path)
    times = [path.stat().st_mtime_ns for path in files]
    demo.write_demo("demo_lora", tmp_path)
    assert [path.stat().st_mtime_ns for path in files] == times


def test_the_demo_trains_and_says_what_to_type_next(demo_run: tuple[Path, str]) -> None:
    out, printed = demo_run
    losses = [record["loss"] for record in read_metrics(out / "metrics.jsonl") if "loss" in record]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    next_line, *questions = printed.splitlines()[-4:]
    assert next_line.startswith("next: ")
    assert f"python generate.py --ckpt {out} --chat" in next_line
    assert questions == [f"  ask it: {text}" for text in demo.suggested_questions("demo")]


def test_the_same_command_again_trains_nothing_and_prints_the_same_summary(
    demo_run: tuple[Path, str],
) -> None:
    out, printed = demo_run
    weights = (out / "final/model.safetensors").stat().st_mtime_ns
    again = run("train.py", "--max_steps", "5", "--logging_steps", "1", "--out_dir", str(out))
    assert "this run is finished" in again
    assert again.splitlines()[-5:] == printed.splitlines()[-5:]
    assert (out / "final/model.safetensors").stat().st_mtime_ns == weights


def test_the_demo_is_scored_beside_its_untrained_self(
    demo_run: tuple[Path, str], tmp_path: Path
) -> None:
    printed = run(
        "eval.py",
        "--task",
        "demo",
        "--ckpt",
        str(demo_run[0]),
        "--limit",
        "10",
        "--out",
        str(tmp_path),
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0 <= summary["untrained"] <= 1 and 0 <= summary["accuracy"] <= 1 and summary["n"] == 10
    assert "untrained" in printed.splitlines()[0]
    assert [line.split()[0] for line in printed.splitlines()[1:-1]] == [*demo.DEMO, "total"]
    assert printed.splitlines()[-1].startswith("next: python generate.py")


def test_the_demo_answers_a_prompt(demo_run: tuple[Path, str]) -> None:
    output = demo_run[0] / "answers.jsonl"
    run(
        "generate.py",
        "--ckpt",
        str(demo_run[0]),
        "--prompt",
        "Which number is larger, 31 or 62?",
        "--greedy",
        "--max_new_tokens",
        "4",
        "--output",
        str(output),
    )
    record = json.loads(output.read_text())
    assert {
        "prompt",
        "prompt_ids",
        "completions",
        "completion_ids",
        "finish_reason",
        "seconds",
        "tokens_per_second",
    } <= record.keys()
    assert len(record["completion_ids"][0]) <= 4


def test_demo_lora_tunes_the_demo(demo_run: tuple[Path, str], tmp_path: Path) -> None:
    run(
        "train.py",
        "--config",
        "demo_lora",
        "--ckpt",
        str(demo_run[0]),
        "--max_steps",
        "3",
        "--out_dir",
        str(tmp_path / "run"),
    )
    about = json.loads((tmp_path / "run/final/adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(demo_run[0] / "final")
    run(
        "generate.py",
        "--ckpt",
        str(tmp_path / "run"),
        "--prompt",
        "What is the third word in cat, dog, owl?",
        "--max_new_tokens",
        "4",
    )
