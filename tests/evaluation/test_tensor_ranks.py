"""eval.py on a grid: tensor ranks divide the model, data ranks the questions; scores are equal."""

import runpy
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

import minillama
from minillama import comm
from minillama.errors import UserError
from minillama.evaluation import predictions
from minillama.files import read_json, read_json_lines
from minillama.tokenizer import Tokenizer
from tests.ranks import run_on_ranks
from tests.tensor_ranks import EIGHT_HEADS

ROOT = Path(__file__).parents[2]
EVALUATE = runpy.run_path(str(ROOT / "eval.py"))["main"]


@pytest.fixture
def model(tiny_checkpoint: Callable, small_tokenizer: Tokenizer) -> Path:
    path = tiny_checkpoint(**EIGHT_HEADS, vocab_size=small_tokenizer.size, max_seq_len=512)
    (path / "tokenizer.model").write_bytes(small_tokenizer.path.read_bytes())
    return path


def run(*words: Any) -> str:
    """What eval.py prints."""
    with redirect_stdout(StringIO()) as printed, redirect_stderr(StringIO()) as notes:
        EVALUATE([str(word) for word in words])
    return printed.getvalue() + notes.getvalue()


def run_on_rank(*words: Any) -> tuple[str, int]:
    """What eval.py prints on this rank, and how many batches of records it writes."""
    original = predictions.append
    num_written = 0

    def append(directory: Path, rank: int, records: Iterable[dict[str, Any]]) -> None:
        nonlocal num_written
        num_written += 1
        original(directory, rank, records)

    predictions.append = append
    return run(*words), num_written


def results_in(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary without its time, and the records without their digests."""
    summary = read_json(directory / "summary.json")
    del summary["seconds"]
    records = list(read_json_lines(directory / "predictions.jsonl"))
    for record in records:
        del record["digest"]
    return summary, records


@pytest.mark.parametrize(("task", "name"), [("mmlu", "mmlu"), ("boolq", "dev.jsonl")])
@pytest.mark.parametrize("ranks", [2, 4], ids=["TP2", "DP2 x TP2"])
def test_ranks_that_divide_the_model_give_the_scores_of_one(
    ranks: int, task: str, name: str, model: Path, data: Path, tmp_path: Path
) -> None:
    words = ("--task", task, "--ckpt", model, "--data", data / name, "--limit", 4)
    run(*words, "--out", tmp_path / "one")
    command = (*words, "--out", tmp_path / "grid", "--tensor_parallel", 2)
    results = run_on_ranks(ranks, run_on_rank, *command)
    for rank, (printed, num_written) in enumerate(results):
        assert (task in printed) == (rank == 0)
        assert bool(printed) == (rank == 0)
        assert (num_written > 0) == (rank % 2 == 0), "the first of each tensor line writes"

    expected_summary, expected = results_in(tmp_path / "one")
    summary, records = results_in(tmp_path / "grid")
    assert summary == expected_summary
    assert len(records) == len(expected)
    for record, other in zip(records, expected, strict=True):
        assert record.pop("scores") == pytest.approx(other.pop("scores"), rel=1e-5)
        assert record == other
    names = sorted(path.name for path in (tmp_path / "grid").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "one").iterdir())


def test_a_run_begun_on_one_rank_goes_on_on_a_grid(model: Path, data: Path, tmp_path: Path) -> None:
    """The checksum of the weights is that of the whole, so the settings are the same."""
    words = ("--task", "boolq", "--ckpt", model, "--data", data / "dev.jsonl", "--out", tmp_path)
    words += ("--batch_size", 1)  # a batch is computed whole if one of it is missing
    run(*words)
    (tmp_path / "summary.json").unlink()
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "predictions.jsonl").write_text("".join(lines[:3]))
    run_on_ranks(4, run, *words, "--tensor_parallel", 2)
    assert (tmp_path / "predictions.jsonl").read_text().splitlines(keepends=True)[:3] == lines[:3]
    assert (tmp_path / "summary.json").is_file()


def evaluate_in_python(path: Path, data: Path) -> dict[str, Any]:
    with comm.start("cpu", timeout_minutes=1) as mesh:
        model = minillama.load(path, mesh=mesh)
        return minillama.evaluate("boolq", model, data=data, limit=4).summary


def test_the_python_api_evaluates_a_divided_model(model: Path, data: Path) -> None:
    whole = minillama.load(model, device="cpu")
    expected = minillama.evaluate("boolq", whole, data=data / "dev.jsonl", limit=4).summary
    for summary in run_on_ranks(2, evaluate_in_python, model, data / "dev.jsonl"):
        assert summary["accuracy"] == expected["accuracy"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "demo", "--tensor_parallel", "2"], "no meaning for --task demo"),
        (["--task", "boolq", "--tensor_parallel", "0"], "must be at least 1"),
    ],
)
def test_what_eval_cannot_divide_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run("--ckpt", "nowhere", "--data", "nowhere", *words)
