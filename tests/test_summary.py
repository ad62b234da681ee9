"""Figures of a run: FLOPs, the smoothed loss, and the last lines that are printed."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from minillama.hf_config import published
from minillama.loss_curves import smoothed
from minillama.training.messages import closing_message
from minillama.training.summary import throughput, training_flops


def test_a_device_that_does_not_report_its_memory_has_a_closing_message() -> None:
    summary = {
        "peak_memory_bytes": None,
        "steps": 2,
        "tokens": 9,
        "last_loss": 1.0,
        "eval_loss": None,
        "seconds": 1.0,
        "tokens_per_second": 9.0,
    }
    assert "peak memory not reported" in closing_message(Path("runs/a"), summary)


@pytest.mark.parametrize(
    ("model", "vocabulary", "sequence", "batch", "seconds", "recompute", "published_tflops"),
    [
        ("7b", 32000, 4096, 16, 3.08, False, 122.39),
        ("13b", 49954, 256, 256, 5.26, True, 160.41),
        ("13b", 32000, 4096, 256, 93.45, False, 120.69),
    ],
)
def test_the_flops_formula_gives_the_published_tables(
    model: str,
    vocabulary: int,
    sequence: int,
    batch: int,
    seconds: float,
    recompute: bool,
    published_tflops: float,
) -> None:
    """AscendSpeed's tables of LLaMA2-7B, Chinese-LLaMA-Alpaca-13B and LLaMA2-13B on 8 devices.

    They round the seconds.
    """
    config = replace(published(model), vocab_size=vocabulary)
    tflops = training_flops(config, batch * sequence, sequence, recompute) / seconds / 8 / 1e12
    assert tflops == pytest.approx(published_tflops, rel=0.01)


def test_smoothing_starts_at_the_first_loss_and_follows_the_rest() -> None:
    assert smoothed([3.0]) == [3.0]
    assert smoothed([2.0] * 10) == pytest.approx([2.0] * 10)
    w = 1.8 * (1 / (1 + math.exp(-0.1)) - 0.5)
    assert smoothed([1.0, 0.0]) == pytest.approx([1.0, w])


def test_the_speed_counts_the_document_that_a_token_is_in_on_average() -> None:
    """Of 400 tokens, 100 are in a document of 100 and 300 in one of 300: 250 on average."""
    config = published("15m")
    speed = throughput(config, 1e9, [100, 300], peak_tflops=500.0)
    tflops = 1e9 * training_flops(config, 1.0, 250.0) / 1e12
    assert speed["tflops"] == pytest.approx(tflops, rel=1e-4)
    assert speed["mfu"] == pytest.approx(tflops / 500.0)
