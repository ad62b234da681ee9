"""Checkpoints one can trust: a run stopped anywhere, by anything, ends at the bytes of one that
was not.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama import comm, train_config
from minillama.checkpoint import train_state
from minillama.checkpoint.run_directory import list_states
from minillama.comm import Mesh
from minillama.data import demo
from minillama.errors import UserError
from minillama.files import write_json
from minillama.parallel.sharded_optimizer import SavedSlice
from minillama.tensor_files import read_safetensors
from minillama.tokenizer import train_tokenizer
from minillama.training import trainer
from minillama.training.run_directory import with_global_batch
from minillama.training.summary import Stopped
from tests.ranks import run_on_ranks

ROOT = Path(__file__).parents[1]
STEPS = 6


@pytest.fixture(scope="module")
def run_settings(tmp_path_factory) -> train_config.TrainConfig:
    """A run of six steps, four micro-batches each, of a model with a few thousand numbers."""
    folder = tmp_path_factory.mktemp("inputs")
    records = demo.records(demo.DEMO, 200, seed=3, held_out=False)
    (folder / "data.json").write_text(json.dumps(records))
    (folder / "tokenizer.model").write_bytes(
        train_tokenizer((r["instruction"] for r in records), 330)
    )
    return train_config.TrainConfig(
        init="scratch",
        dim=16,
        n_layers=2,
        n_heads=2,
        ffn_dim=32,
        context=64,
        tokenizer=str(folder / "tokenizer.model"),
        data=(str(folder / "data.json"),),
        cache_dir=str(folder / "cache"),
        template="llama_factory_default",
        max_length=64,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=0,
        reduction="exact",
        threads=1,
        device="cpu",
        plot_loss=False,
    )


def train_here(run: train_config.TrainConfig, stop_after: int = 0) -> int:
    """Train on this rank; `stop_after` steps the way a SIGTERM stops, at the next micro-batch.

    Returns the steps done.
    """
    torch.set_num_threads(1)
    with comm.start("cpu", timeout_minutes=1) as mesh:
        settings_here = replace(
            run, gradient_accumulation_steps=run.gradient_accumulation_steps // mesh.size
        )
        if stop_after:
            original = trainer.Trainer.update

            def update(self, batches, rate):
                if (
                    self.step == stop_after and mesh.rank == mesh.size - 1
                ):  # the signal reaches one rank only
                    os.kill(os.getpid(), signal.SIGTERM)
                return original(self, batches, rate)

            trainer.Trainer.update = update
        outcome = trainer.train(settings_here, mesh)
        return outcome.step if isinstance(outcome, Stopped) else STEPS


def fingerprint(run: train_config.TrainConfig, step: int = 4) -> str:
    """Of the final weights, and of the optimizer's state at a step: position by position,
    whoever wrote which file.
    """
    digest = hashlib.sha256((Path(run.out_dir) / "final" / "model.safetensors").read_bytes())
    directory = Path(run.out_dir) / "checkpoints" / f"step-{step:06d}"
    total = sum(read_safetensors(path)["m"].shape[0] for path in directory.glob("state-0-*"))
    for name in ("master", "m", "v"):
        digest.update(
            train_state.slice_reader(directory, 0, total)(name, 0, total).numpy().tobytes()
        )
    return digest.hexdigest()


@pytest.fixture(scope="module")
def uninterrupted(run_settings, tmp_path_factory) -> str:
    run = replace(run_settings, out_dir=str(tmp_path_factory.mktemp("whole") / "run"))
    train_here(run)
    return fingerprint(run)


def test_stopped_on_four_ranks_continued_on_one_finished_on_two_is_as_if_never_stopped(
    run_settings, uninterrupted, tmp_path
):
    run = replace(run_settings, out_dir=str(tmp_path / "run"), zero_stage=2)
    assert run_on_ranks(4, train_here, run, 1) == [1] * 4
    assert run_on_ranks(1, train_here, replace(run, zero_stage=0), 3) == [3]
    assert run_on_ranks(2, train_here, replace(run, zero_stage=1)) == [STEPS] * 2
    assert fingerprint(run) == uninterrupted
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, STEPS + 1))


def test_ranks_that_cannot_keep_the_global_batch_are_refused(run_settings, tmp_path):
    run = replace(run_settings, out_dir=str(tmp_path / "run"))
    run_on_ranks(1, train_here, run, 2)
    with pytest.raises(UserError, match="global batch is 4 rows, which 3 ranks"):
        with_global_batch(run, Mesh(rank=0, size=3), 4)


FILES = [
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "minillama.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "state-0-000000000000.safetensors",
    "state.json",
    "manifest.json",
]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(
    run_settings, uninterrupted, tmp_path, name, capsys
):
    run = replace(run_settings, out_dir=str(tmp_path / "run"))
    run_on_ranks(1, train_here, run, 4)
    damaged = tmp_path / "run" / "checkpoints" / "step-000004" / name
    assert sorted(path.name for path in damaged.parent.iterdir()) == sorted(FILES)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0x10
    damaged.write_bytes(content)
    assert run_on_ranks(1, train_here, run) == [STEPS]
    assert fingerprint(run) == uninterrupted
    assert train_state.verify(damaged.parent) is None, "the step was saved again, intact"


def test_a_damaged_checkpoint_named_by_the_user_is_refused(run_settings, tmp_path):
    run = replace(run_settings, out_dir=str(tmp_path / "run"))
    run_on_ranks(1, train_here, run, 2)
    state = tmp_path / "run" / "checkpoints" / "step-000002" / "state.json"
    state.write_text(state.read_text().replace('"step": 2', '"step": 3'))
    with pytest.raises(
        UserError, match=r"state.json: its content is not what was written.*--resume"
    ):
        train_state.read_state(state.parent)


@pytest.mark.parametrize("size, failing", [(1, 0), (2, 1)])
def test_a_full_disk_leaves_the_old_checkpoint_and_training_goes_on(
    run_settings, uninterrupted, tmp_path, size, failing
):
    run = replace(run_settings, out_dir=str(tmp_path / "run"))

    def with_full_disk():
        write = train_state.write_safetensors

        def full(path, tensors):
            if "step-000004" in str(path) and int(os.environ.get("RANK", "0")) == failing:
                raise OSError(28, "No space left on device", str(path))
            write(path, tensors)

        train_state.write_safetensors = full
        return train_here(run)

    assert run_on_ranks(size, with_full_disk) == [STEPS] * size
    assert [path.name for path in list_states(tmp_path / "run")] == ["step-000002"]
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))
    final = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    assert final


def test_too_little_space_is_seen_before_the_first_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    problem = train_state.save_state(
        tmp_path, 1, Mesh(), [SavedSlice(0, {"m": torch.ones(3)})], {}, lambda _: None, keep=0
    )
    assert "12 bytes are needed" in problem and not list_states(tmp_path)


# The call at which the process dies during the second save: a function, and which call of it.
POINTS = [
    ("write_safetensors", 1),
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
            (train_state, ("write_safetensors", "write_json", "flush_and_hash", "publish")),
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


def test_only_the_newest_checkpoints_are_kept(run_settings, tmp_path):
    run = replace(run_settings, out_dir=str(tmp_path / "run"), save_steps=1, save_total_limit=2)
    run_on_ranks(1, train_here, run)
    assert [path.name for path in list_states(tmp_path / "run")] == [
        "step-000004",
        "step-000005",
    ]


def test_sigterm_to_the_script_saves_and_exits_0_and_the_same_command_goes_on(
    run_settings, uninterrupted, tmp_path
):
    run = replace(run_settings, out_dir=str(tmp_path / "run"))
    write_json(tmp_path / "run.json", asdict(run))
    command = [sys.executable, "-c", SLOW, "--config", str(tmp_path / "run.json")]
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
    assert process.returncode == 0 and "stopped by SIGTERM after step" in out
    done = subprocess.run(
        [sys.executable, "train.py", "--config", str(tmp_path / "run.json")],
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


@settings(max_examples=30, deadline=None)
@given(total=st.integers(1, 200), writers=st.integers(1, 5), readers=st.integers(1, 5))
def test_any_number_of_ranks_reads_back_what_any_number_wrote(
    tmp_path_factory, total, writers, readers
):
    folder, vector = tmp_path_factory.mktemp("state"), torch.arange(float(total))
    size = -(-total // writers)
    for start in range(0, total, size):
        part = vector[start : start + size]
        train_state.write_safetensors(folder / f"state-0-{start:012d}.safetensors", {"m": part})
    read, share = train_state.slice_reader(folder, 0, total), -(-total // readers)
    assert torch.equal(
        torch.cat(
            [read("m", start, min(start + share, total)) for start in range(0, total, share)]
        ),
        vector,
    )
    with pytest.raises(UserError, match="belongs to another run"):
        train_state.slice_reader(folder, 0, total + 1)
