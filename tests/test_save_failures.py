"""A save that fails, and a process that dies: the run continues to the same bytes."""

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from minillama.checkpoint import train_state
from minillama.checkpoint.run_directory import list_states
from minillama.comm import Mesh
from minillama.files import write_json
from minillama.parallel.sharded_optimizer import SavedSlice
from minillama.training import trainer
from tests.ranks import run_on_ranks
from tests.state_runs import STEPS, fingerprint, train_here

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("size, failing", [(1, 0), (2, 1)])
def test_a_full_disk_leaves_the_old_checkpoint_and_training_goes_on(
    run_settings, uninterrupted, tmp_path, size, failing
):
    run = replace(run_settings, out_dir=str(tmp_path / "run"))

    def with_full_disk():
        write = train_state.write_slice

        def full(path, part):
            if "step-000004" in str(path) and int(os.environ.get("RANK", "0")) == failing:
                raise OSError(28, "No space left on device", str(path))
            write(path, part)

        train_state.write_slice = full
        return train_here(run)

    assert run_on_ranks(size, with_full_disk) == [STEPS] * size
    assert [path.name for path in list_states(tmp_path / "run")] == ["step-000002"]
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))
    final = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    assert final


def test_too_little_space_is_seen_before_the_first_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    problem = train_state.save_state(
        tmp_path, 1, Mesh(), [SavedSlice([], {"m": torch.ones(3)})], {}, lambda _: None, keep=0
    )
    assert "12 bytes are needed" in problem and not list_states(tmp_path)


# The call at which the process dies during the second save: a function, and which call of it.
POINTS = [
    ("write_slice", 1),
    ("fsync", 3),  # the first of this save: that of the optimizer's state
    ("flush_and_hash", 1),
    ("replace", 1),  # config.json gets its name
    ("write_json", 1),  # state.json
    ("replace", 5),  # and its name
    ("flush_and_hash", 5),
    ("write_json", 2),  # manifest.json
    ("replace", 6),  # and its name
    ("publish", 1),
    ("replace", 7),  # the directory gets its name
    ("fsync", 25),  # after that
]


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_a_save_killed_at_any_point_leaves_a_run_that_continues_to_the_same_bytes(
    run_settings, uninterrupted, tmp_path, point
):
    """The process dies, as by kill -9, before a call that touches the disk."""
    run = replace(run_settings, out_dir=str(tmp_path / "run"))

    def killed():
        calls = Counter()

        def deadly(function):
            def call(*arguments, **keywords):
                if (Path(run.out_dir) / "checkpoints" / "step-000002").is_dir():
                    calls[function.__name__] += 1
                if calls[point[0]] == point[1]:
                    os._exit(9)
                return function(*arguments, **keywords)

            return call

        for module, names in (
            (train_state, ("write_slice", "write_json", "flush_and_hash", "publish")),
            (os, ("replace", "fsync")),
        ):
            for name in names:
                setattr(module, name, deadly(getattr(module, name)))
        train_here(run)

    child = os.fork()
    if child == 0:
        killed()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    assert train_state.verify(list_states(tmp_path / "run")[-1]) is None
    assert run_on_ranks(1, train_here, run) == [STEPS]
    assert fingerprint(run) == uninterrupted


@pytest.mark.parametrize("how", ["raises", "is lost"])
def test_after_a_rank_that_raises_or_is_lost_the_run_continues_to_the_same_bytes(
    run_settings, uninterrupted, tmp_path, how
):
    run = replace(run_settings, out_dir=str(tmp_path / "run"), zero_stage=2)

    def fail_in_step_4():
        original = trainer.Trainer.update

        def update(self, batches, rate):
            if self.step == 3 and self.mesh.rank == 1:
                os._exit(9) if how == "is lost" else [][0]
            return original(self, batches, rate)

        trainer.Trainer.update = update
        return train_here(run)

    with pytest.raises(
        AssertionError, match=r"rank 0 of 2: .* failed: a peer has ended|rank 1:[\s\S]*IndexError"
    ):
        run_on_ranks(2, fail_in_step_4)
    assert [path.name for path in list_states(tmp_path / "run")] == ["step-000002"]
    assert run_on_ranks(2, train_here, run) == [STEPS] * 2
    assert fingerprint(run) == uninterrupted


def test_sigterm_to_the_script_saves_and_exits_143_and_the_same_command_goes_on(
    run_settings, uninterrupted, tmp_path
):
    run = replace(run_settings, out_dir=str(tmp_path / "run"))
    settings = str(tmp_path / "train_config.json")
    write_json(Path(settings), asdict(run))
    command = [sys.executable, "-c", SLOW, "--config", settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while (
        time.monotonic() < deadline
        and not (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()
    ):
        time.sleep(0.02)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopped by SIGTERM after step" in out
    done = subprocess.run(
        [sys.executable, "train.py", "--config", settings],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "resuming" in done.stdout, done.stderr
    assert fingerprint(run) == uninterrupted


# train.py with steps slow enough to be interrupted
SLOW = """
import runpy, sys, time
from minillama.training import trainer
update = trainer.Trainer.update
trainer.Trainer.update = lambda self, *a: (time.sleep(0.3), update(self, *a))[1]
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""
