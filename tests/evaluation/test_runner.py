"""Runs: an interruption, other ranks and a continued file change no prediction."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minillama.comm import Mesh, start
from minillama.errors import UserError
from minillama.evaluation import runner
from minillama.evaluation.likelihood import QueryResult
from minillama.evaluation.multiple_choice import MultipleChoice
from minillama.evaluation.options import EvalOptions
from minillama.generation.output_file import without_digest
from minillama.grid import make_grid
from minillama.model import Llama
from minillama.tokenizer import Tokenizer
from tests.conftest import random_model
from tests.ranks import run_on_ranks

MESH = Mesh()


def predict(
    model: Llama, test: MultipleChoice, out: Path | None, mesh: Mesh = MESH, **settings
) -> list[dict]:
    return runner.predict(model, test, 4, out, {"dtype": "float32", **settings}, make_grid(mesh))


class Recorder(MultipleChoice):
    """The questions of a task; `computed` lists the ids whose results were computed."""

    def __init__(self, options: EvalOptions, tokenizer: Tokenizer) -> None:
        super().__init__(options, tokenizer, max_length=512)
        self.computed: list[str] = []

    def make_record(self, id: str, result: QueryResult) -> dict:
        self.computed.append(id)
        return super().make_record(id, result)


def interrupt_at_forward(model: Llama, count: int) -> torch.utils.hooks.RemovableHandle:
    """Let the forward pass with this number raise KeyboardInterrupt, as Ctrl-C does."""
    calls = []

    def hook(*_) -> None:
        calls.append(None)
        if len(calls) == count:
            raise KeyboardInterrupt

    return model.register_forward_pre_hook(hook)


def test_an_interrupted_run_goes_on_and_its_file_is_that_of_an_uninterrupted_one(
    model: Llama, options: Callable, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    test = Recorder(options("mmlu"), small_tokenizer)
    whole = predict(model, test, tmp_path / "whole")
    expected = (tmp_path / "whole/predictions.jsonl").read_bytes()
    assert [without_digest(json.loads(line)) for line in expected.splitlines()] == whole
    assert predict(model, test, None) == whole

    test.computed.clear()
    handle = interrupt_at_forward(model, count=4)  # in the second prefix or the third batch
    try:
        with pytest.raises(KeyboardInterrupt):
            predict(model, test, tmp_path / "stopped")
    finally:
        handle.remove()
    path = tmp_path / "stopped/predictions.jsonl"
    assert 0 < len(path.read_text().splitlines()) == len(test.computed) < len(whole)
    with open(path, "a") as file:
        file.write('{"id": "anatomy/0", "sub')  # the line a crash cut short

    assert predict(model, test, tmp_path / "stopped") == whole
    assert path.read_bytes() == expected
    assert sorted(test.computed) == sorted(test.queries)  # nothing is computed twice
    predict(model, test, tmp_path / "stopped")
    assert len(test.computed) == len(whole)


def test_predictions_of_other_settings_are_refused(
    model: Llama, benchmark: Callable, tmp_path: Path
) -> None:
    test = benchmark("mmlu", limit=1)
    predict(model, test, tmp_path, n_shots=5)
    with pytest.raises(UserError, match="n_shots = 5, now it is 0"):
        predict(model, test, tmp_path, n_shots=0)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(UserError, match="dtype = None"):
        predict(model, test, tmp_path, n_shots=5)


def test_another_model_is_told_by_its_weights() -> None:
    checksums = [runner.weights_checksum(random_model(seed)) for seed in (0, 0, 1)]
    assert checksums[0] == checksums[1] != checksums[2]


def test_two_ranks_share_the_questions_and_write_the_file_of_one(
    model: Llama, options: Callable, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    test = Recorder(options("mmlu"), small_tokenizer)
    expected = predict(model, test, tmp_path / "one")

    def rank() -> tuple[list[str], list[dict]]:
        test.computed.clear()
        torch.set_num_threads(1)
        with start("cpu") as mesh:
            records = predict(model, test, tmp_path / "two", mesh)
        return test.computed, records

    (computed_by_0, records_of_0), (computed_by_1, records_of_1) = run_on_ranks(2, rank)
    assert records_of_0 == records_of_1 == expected
    assert computed_by_0 and computed_by_1
    assert sorted(computed_by_0 + computed_by_1) == sorted(test.queries)
    names = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert names == ["predictions.jsonl", "settings.json"]
    one, two = ((tmp_path / out / "predictions.jsonl").read_bytes() for out in ("one", "two"))
    assert one == two


def test_scores_that_are_not_finite_stop_the_run(
    benchmark: Callable, small_tokenizer: Tokenizer
) -> None:
    broken = random_model(vocab_size=small_tokenizer.size, max_seq_len=512)
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"boolq/\d+: its scores are .*nan"):
        predict(broken, benchmark("boolq"), None)
