"""Checkpoints: a run that is stopped and resumed ends at the bytes of one that was not."""

import json
from dataclasses import replace

import pytest

from minillama.checkpoint import train_state
from minillama.checkpoint.run_directory import list_states
from minillama.comm import Mesh
from minillama.errors import UserError
from minillama.grid import make_grid
from minillama.training.run_directory import with_global_batch
from tests.ranks import run_on_ranks
from tests.state_runs import STEPS, fingerprint, train_here


def test_stopped_on_four_ranks_continued_on_one_finished_on_two_is_as_if_never_stopped(
    run_settings, uninterrupted, tmp_path
):
    """State is found by the names of parameters, and batches by their step number."""
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
    with pytest.raises(UserError, match="global batch is 4 rows, which 3 data ranks"):
        mesh = Mesh(rank=0, size=3)
        with_global_batch(run, make_grid(mesh), 4)


FILES = [
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "minillama.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "state-00000-0.safetensors",
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


def test_only_the_newest_checkpoints_are_kept(run_settings, tmp_path):
    run = replace(run_settings, out_dir=str(tmp_path / "run"), save_steps=1, save_total_limit=2)
    run_on_ranks(1, train_here, run)
    assert [path.name for path in list_states(tmp_path / "run")] == [
        "step-000004",
        "step-000005",
    ]
