"""What the scripts print and how they end: exit codes, errors of one line, and what is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minillama.errors import UserError
from minillama.train_config import TrainConfig
from minillama.training import run

ROOT = Path(__file__).parents[1]


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_missing_weights_and_data_end_with_the_complete_command() -> None:
    done = script("train.py", "--config", "7b_lora", LOCAL_WORLD_SIZE="8")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    launcher = "torchrun --nproc_per_node 8 train.py --config 7b_lora"
    assert f"{launcher} --ckpt LLAMA_DIR --data alpaca_data.json" in done.stderr
    assert "huggingface.co/meta-llama" in done.stderr
    assert "github.com/tatsu-lab/stanford_alpaca" in done.stderr


def test_only_what_is_missing_is_asked_for() -> None:
    with pytest.raises(UserError) as error:
        run.check_inputs(TrainConfig(ckpt="llama"), "python train.py --ckpt llama")
    assert "type: python train.py --ckpt llama --data alpaca_data.json" in str(error.value)
    assert "LLAMA_DIR" not in str(error.value)
    run.check_inputs(TrainConfig(ckpt="llama", data=("a.json",)), "")


def test_dry_run_prints_the_plan() -> None:
    done = script("train.py", "--config", "70b_lora", "--dry_run", "--world_size", "8")
    assert done.returncode == 0
    assert "68,976,648,192" in done.stdout


def test_list_configs_prints_a_line_for_each_preset() -> None:
    done = script("train.py", "--list_configs")
    presets = {path.stem for path in (ROOT / "minillama/configs").glob("*.toml")}
    others = sorted(presets - {"demo", "demo_lora"})
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["demo", "demo_lora", *others]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("train.py", "--epochs", "3"), "unknown argument --epochs"),
        (("generate.py",), "--ckpt DIR is missing"),
        (("generate.py", "--ckpt", "x"), "nothing to answer"),
        (("eval.py", "--task", "dmeo"), "did you mean 'demo'"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(
    arguments: tuple[str, ...], named: str
) -> None:
    done = script(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert named in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_debug_shows_the_traceback() -> None:
    done = script("generate.py", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr
