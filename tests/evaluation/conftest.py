"""Small questions, a small model and the options of a task, for the tests of evaluation."""

import csv
import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from minillama.evaluation.multiple_choice import MultipleChoice
from minillama.evaluation.options import EvalOptions
from minillama.model import Llama
from minillama.tokenizer import Tokenizer
from tests.conftest import random_model, random_tokens

ROOT = Path(__file__).parents[2]
WORDS = "the cat sat on a mat twice world hello user task response chat assistant".split()
SUBJECTS = ("anatomy", "astronomy", "virology")
NUM_SHOTS = 5  # rows of a subject's dev file; four more are its questions

# folder -> (split of the questions, name of a file in a split's folder, header)
LAYOUTS = {
    "mmlu": ("test", "{subject}_{split}.csv", None),
    "ceval": ("val", "{subject}_{split}.csv", ["id", "question", *"ABCD", "answer"]),
    "cmmlu": ("test", "{subject}.csv", ["", "Question", *"ABCD", "Answer"]),
}


def words(seed: int, count: int) -> str:
    tokens = random_tokens(count, vocab_size=999, seed=seed).tolist()
    return " ".join(WORDS[token % len(WORDS)] for token in tokens)


def question_row(subject: int, number: int) -> list[str]:
    """A question, four choices and an answer."""
    question = words(7 * subject + number, 3 + number % 5)
    choices = [words(100 * subject + 10 * number + choice, 2) for choice in range(4)]
    return [question, *choices, "ABCD"[number * number % 4]]


def write_csv(path: Path, rows: list[list[str]], header: list[str] | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if header:
        rows = [header, *([str(number), *row] for number, row in enumerate(rows))]
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files in the published layouts of MMLU, C-Eval, CMMLU and BoolQ."""
    root = tmp_path_factory.mktemp("data")
    for index, subject in enumerate(SUBJECTS):
        rows = [question_row(index, number) for number in range(9)]
        for folder, (question_split, name, header) in LAYOUTS.items():
            for split, part in (("dev", rows[:NUM_SHOTS]), (question_split, rows[4:])):
                path = root / folder / split / name.format(subject=subject, split=split)
                write_csv(path, part, header)
    lines = []
    for number in range(10):
        record = {
            "question": words(number, 4),
            "title": "t",
            "answer": number % 3 > 0,
            "passage": words(number // 2, 20),
        }
        lines.append(json.dumps(record) + "\n")
    (root / "dev.jsonl").write_text("".join(lines))
    return root


@pytest.fixture(scope="session")
def model(small_tokenizer: Tokenizer) -> Llama:
    return random_model(vocab_size=small_tokenizer.size, max_seq_len=512).eval()


@pytest.fixture(scope="session")
def options(data: Path) -> Callable[..., EvalOptions]:
    """The options of a task on its small files; keywords change them."""

    def make(task: str, **changes) -> EvalOptions:
        path = data / ("dev.jsonl" if task == "boolq" else task)
        return EvalOptions(**{"task": task, "data": str(path), **changes})

    return make


@pytest.fixture(scope="session")
def benchmark(options: Callable, small_tokenizer: Tokenizer) -> Callable[..., MultipleChoice]:
    """The questions of a task and their queries; keywords change the options."""

    def make(
        task: str, max_length: int = 512, tokenizer: Tokenizer = small_tokenizer, **changes
    ) -> MultipleChoice:
        return MultipleChoice(options(task, **changes), tokenizer, max_length)

    return make


@pytest.fixture(scope="session")
def main() -> Callable[[list[str]], int]:
    """`main` of eval.py."""
    return runpy.run_path(str(ROOT / "eval.py"))["main"]


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable, small_tokenizer: Tokenizer) -> Path:
    """A random model with a tokenizer."""
    directory = tiny_checkpoint(vocab_size=small_tokenizer.size, max_seq_len=512)
    (directory / "tokenizer.model").write_bytes(small_tokenizer.path.read_bytes())
    return directory


@pytest.fixture
def boolq(checkpoint: Path, data: Path) -> list[str]:
    """The arguments of eval.py that score the checkpoint on BoolQ."""
    return ["--task", "boolq", "--ckpt", str(checkpoint), "--data", str(data / "dev.jsonl")]
