"""Figures of a run: FLOPs, the smoothed loss, and the last lines that are printed."""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from minillama.comm import Mesh
from minillama.errors import UserError
from minillama.hf_config import published
from minillama.loss_curves import needs_log_scale, smoothed
from minillama.train_config import TrainConfig
from minillama.training.messages import closing_message
from minillama.training.metrics import draw_loss
from minillama.training.run import prepare
from minillama.training.summary import throughput, training_flops

SUMMARY = {
    "peak_memory_bytes": None,
    "steps": 2,
    "tokens": 9,
    "last_loss": 1.0,
    "eval_loss": None,
    "seconds": 1.0,
    "tokens_per_second": 9.0,
}


def test_a_device_that_does_not_report_its_memory_has_a_closing_message() -> None:
    assert "peak memory not reported" in closing_message(Path("runs/a"), SUMMARY)


def test_a_chat_is_proposed_for_a_model_with_a_template(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    assert f"next: python generate.py --ckpt {tmp_path} --prompt" in closing_message(
        tmp_path, SUMMARY
    )
    (tmp_path / "final/minillama.json").write_text('{"template": "alpaca"}')
    assert f"next: python generate.py --ckpt {tmp_path} --chat" in closing_message(
        tmp_path, SUMMARY
    )


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


def test_smoothing_has_no_bias_towards_the_first_loss() -> None:
    assert smoothed([3.0]) == pytest.approx([3.0])
    assert smoothed([2.0] * 10) == pytest.approx([2.0] * 10)
    w = 1.8 * (1 / (1 + math.exp(-0.1)) - 0.5)
    assert smoothed([1.0, 0.0]) == pytest.approx([1.0, w / (1 + w)])  # weights w and 1
    high_first_loss = [1.0] + [0.0] * 99  # of 100 values w is 0.89
    assert smoothed(high_first_loss)[20] < 0.02  # started at the first loss: 0.89^20, 0.09


def test_the_axis_is_logarithmic_if_the_range_is_a_factor_of_ten() -> None:
    assert needs_log_scale({"loss": [(1, 10.0), (2, 1.0)]})
    assert not needs_log_scale({"loss": [(1, 10.0), (2, 1.1)]})
    assert not needs_log_scale({"error": [(1, 1.0), (2, 0.0)]})
    assert needs_log_scale({"a": [(1, 10.0)], "b": [(1, 0.5)]})


def test_a_plot_that_is_not_drawn_is_said_in_one_line_with_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    draw_loss(tmp_path, insist=False)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"note: {tmp_path}/loss.png was not drawn: "
        "matplotlib is not installed; pip install matplotlib"
    ]
    with pytest.raises(UserError, match="pip install matplotlib"):
        draw_loss(tmp_path, insist=True)


def test_a_plot_that_cannot_be_drawn_is_refused_before_training(
    settings_for: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    settings = settings_for(plot_loss=True)
    with pytest.raises(UserError, match=r"^plot_loss: matplotlib is not installed; pip install"):
        prepare(settings, Mesh())
    assert not Path(settings.out_dir).exists()


def test_the_speed_counts_the_document_that_a_token_is_in_on_average() -> None:
    """Of 400 tokens, 100 are in a document of 100 and 300 in one of 300: 250 on average."""
    config = published("15m")
    speed = throughput(config, 1e9, [100, 300], peak_tflops=500.0)
    tflops = 1e9 * training_flops(config, 1.0, 250.0) / 1e12
    assert speed["tflops"] == pytest.approx(tflops, rel=1e-4)
    assert speed["mfu"] == pytest.approx(tflops / 500.0)
