"""benchmarks/cuda.py on the CPU, in its tiny form: its sides compute the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cuda, cuda_7b, cuda_legs
from minillama import ops

Result = dict[str, Any]


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, Result]]:
    """What the short legs find, by their titles, and the plain loop's training."""
    found = {}
    for leg in (*cuda.tiny_legs("loop"), *cuda.tiny_legs("transformers")):
        if leg.name == "train" or leg.name in ("decoding", "attention"):
            found[leg.title] = cuda.be_leg(leg, "cpu")
            ops.choose("")
    yield found
    ops.choose("")


def test_all_sides_begin_with_the_same_loss_and_learn_alike(results: dict[str, Result]) -> None:
    pytest.importorskip("transformers")
    sides = {title: found for title, found in results.items() if title.startswith("train")}
    assert len(sides) == 6
    first, last = zip(*((s["first_loss"], s["last_loss"]) for s in sides.values()), strict=True)
    assert max(first) - min(first) < 1e-3
    assert max(last) - min(last) < 1e-3
    assert max(last) < min(first)


def test_recomputing_and_zero_change_nothing(results: dict[str, Result]) -> None:
    ours = results["train tiny minillama"]
    assert results["train tiny minillama+recompute"]["last_loss"] == ours["last_loss"]
    for stage in (1, 2):
        zero = results[f"train tiny minillama+zero{stage}"]
        assert zero["last_loss"] == pytest.approx(ours["last_loss"], abs=1e-3)


def test_packed_attention_is_attention_with_a_mask(results: dict[str, Result]) -> None:
    assert results["attention tiny"]["difference"] < 1e-2  # bf16
    assert results["decoding tiny"]["batch_8"] > 0


def test_a_side_that_begins_with_another_loss_is_void() -> None:
    side = {"tokens_per_second": 2.0, "peak_bytes": 4, "first_loss": 6.0}
    faster = {"tokens_per_second": 4.0, "peak_bytes": 2, "first_loss": 6.0}
    results = {"train 110m minillama": faster, "train 110m loop": side}
    assert cuda.compare(results) == ["110m: minillama is 2.00 x loop, at 0.50 of its memory"]
    results["train 110m loop"] = side | {"first_loss": 6.5}
    assert "VOID" in cuda.compare(results)[0]
    results["train 110m loop"] = {"failed": "no memory"}
    assert cuda.compare(results) == []


def test_the_7b_recipe_fits_a_card_of_24_gb_by_its_plan(tmp_path: Path) -> None:
    """13.5 GB of weights, the adapters with their moments, and one layer's activations."""
    card = cuda_legs.Settings(torch.device("cpu"), "7b", 4, 1024, 4, "")
    promise = cuda_7b.promised(card, cuda_7b.train_arguments(card, tmp_path))
    assert 13.9e9 < promise["dry_run_state_bytes"] < 14.5e9
    assert 1e9 < promise["dry_run_activation_bytes"] < 3e9


def test_without_a_card_the_command_says_what_to_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["cuda.py"])
    with pytest.raises(SystemExit, match="no NVIDIA card here; --device cpu --shape tiny"):
        cuda.main()
