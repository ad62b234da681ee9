"""A run goes on with the data, weights and tokenizer that it began with, whatever their paths."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillama import comm
from minillama.comm import Mesh
from minillama.errors import UserError
from minillama.files import write_json
from minillama.tensor_files import read_safetensors
from minillama.tensor_writers import write_safetensors
from minillama.tokenizer import train_tokenizer
from minillama.train_config import TrainConfig
from minillama.training.trainer import train
from tests.ranks import run_on_ranks
from tests.runs import weights_of

MESH = Mesh()


@pytest.fixture
def own_run(settings_for: Callable, inputs: Path, tmp_path: Path) -> TrainConfig:
    """A run of six steps on copies of its inputs, which a test may change."""
    for name in ("base", "adapter"):
        shutil.copytree(inputs / "base", tmp_path / name)
    for name in ("alpaca.json", "tokenizer.model"):
        shutil.copy(inputs / name, tmp_path / name)
    return settings_for(
        ckpt=str(tmp_path / "base"),
        data=(str(tmp_path / "alpaca.json"),),
        tokenizer=str(tmp_path / "tokenizer.model"),
        save_strategy="steps",
        save_steps=2,
    )


def interrupted(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Finish a run, make it one that was stopped after its newest checkpoint, and return what its
    final weights were.
    """
    train(config, MESH)
    weights = weights_of(Path(config.out_dir) / "final")
    shutil.rmtree(Path(config.out_dir) / "final")
    (Path(config.out_dir) / "summary.json").unlink()
    return weights


def change_weights(directory: Path) -> None:
    """Double one weight. Size and header of the file stay as they are."""
    path = next(directory.glob("*model.safetensors"))
    tensors = {name: ref.read() for name, ref in read_safetensors(path).items()}
    next(iter(tensors.values())).mul_(2)
    write_safetensors(path, tensors)


def change_data(config: TrainConfig) -> None:
    path = Path(config.data[0])
    path.write_text(path.read_text().replace("repeat", "reapet"))


def change_tokenizer(config: TrainConfig) -> None:
    texts = [record["output"] for record in json.loads(Path(config.data[0]).read_text())]
    Path(config.tokenizer).write_bytes(train_tokenizer(texts, 300))


CHANGES = {
    "data": change_data,
    "ckpt": lambda config: change_weights(Path(config.ckpt)),
    "tokenizer": change_tokenizer,
}


@pytest.mark.parametrize("key", CHANGES)
def test_what_changed_under_its_name_is_refused_by_its_key(key: str, own_run: TrainConfig) -> None:
    interrupted(own_run)
    CHANGES[key](own_run)
    with pytest.raises(UserError, match=rf"{key} = .*fingerprint .* then, .*--overwrite_output"):
        train(own_run, MESH)
    assert train(own_run, MESH, overwrite=True)["steps"] == 6


def test_a_changed_adapter_is_refused_by_its_key(own_run: TrainConfig, tmp_path: Path) -> None:
    first = replace(own_run, lora=True, out_dir=str(tmp_path / "first"))
    train(first, MESH)
    shutil.rmtree(tmp_path / "adapter")
    shutil.copytree(tmp_path / "first/final", tmp_path / "adapter")
    second = replace(own_run, lora=True, adapter=str(tmp_path / "adapter"))
    interrupted(second)
    change_weights(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"adapter = .*fingerprint"):
        train(second, MESH)


def test_equal_bytes_under_other_paths_go_on_to_the_same_weights(
    own_run: TrainConfig, tmp_path: Path
) -> None:
    expected = interrupted(own_run)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("base", "alpaca.json", "tokenizer.model"):
        (tmp_path / name).rename(moved / name)
    elsewhere = replace(
        own_run,
        ckpt=str(moved / "base"),
        data=(str(moved / "alpaca.json"),),
        tokenizer=str(moved / "tokenizer.model"),
    )
    train(elsewhere, MESH)
    weights = weights_of(Path(own_run.out_dir) / "final")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_new_time_of_a_file_is_no_change(own_run: TrainConfig) -> None:
    interrupted(own_run)
    for path in (*Path(own_run.ckpt).iterdir(), Path(own_run.tokenizer), Path(own_run.data[0])):
        os.utime(path, (1, 1))
    assert train(own_run, MESH)["steps"] == 6


def test_a_header_that_changed_at_the_same_size_and_time_is_seen(own_run: TrainConfig) -> None:
    interrupted(own_run)
    weights = Path(own_run.ckpt) / "model.safetensors"
    times = weights.stat()
    change_weights(Path(own_run.ckpt))
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match="ckpt = "):
        train(own_run, MESH)


def test_a_finished_run_is_finished_only_for_what_it_read(
    own_run: TrainConfig, tmp_path: Path
) -> None:
    summary = train(own_run, MESH)
    shutil.copy(own_run.data[0], tmp_path / "same.json")
    assert train(replace(own_run, data=(str(tmp_path / "same.json"),)), MESH) == summary
    change_data(own_run)
    with pytest.raises(UserError, match="data = "):
        train(own_run, MESH)
    Path(own_run.data[0]).unlink()
    same = replace(own_run, data=(str(tmp_path / "same.json"),))
    assert train(same, MESH) == summary


def test_a_run_of_before_fingerprints_goes_on_and_compares_paths(own_run: TrainConfig) -> None:
    interrupted(own_run)
    out_dir = Path(own_run.out_dir)
    (out_dir / "inputs.json").unlink()
    for directory in (out_dir / "checkpoints").iterdir():
        state = json.loads((directory / "state.json").read_text())
        del state["fingerprints"]
        write_json(directory / "state.json", state)
        write_json(directory / "manifest.json", {"sha256": {}})
    with pytest.raises(UserError, match=r"data was .*, is "):
        train(replace(own_run, data=("other.json",)), MESH)
    assert train(own_run, MESH)["steps"] == 6


def train_with_own_settings(settings: list[TrainConfig]) -> str:
    """Train on this rank with the settings of its own. Returns the error."""
    with comm.start("cpu", timeout_minutes=1) as mesh:
        try:
            train(settings[mesh.rank], mesh)
        except UserError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 7}, "seed is 42 on rank 0, 7 on rank 1"),
        ({"learning_rate": 0.5}, "learning_rate is 0.003 on rank 0, 0.5 on rank 1"),
        ({"zero_stage": 2}, "zero_stage is 0 on rank 0, 2 on rank 1"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size is 2 on rank 0, 4"),
    ],
    ids=["seed", "learning_rate", "zero_stage", "batch"],
)
def test_ranks_with_other_settings_are_refused_by_key_and_values(
    changes: dict, difference: str, settings_for: Callable, tmp_path: Path
) -> None:
    settings = [settings_for(), settings_for(**changes)]
    errors = run_on_ranks(2, train_with_own_settings, settings)
    assert errors[0] == errors[1]
    assert difference in errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["data", "ckpt"])
def test_ranks_with_other_files_are_refused_by_key(key: str, own_run: TrainConfig) -> None:
    """Each machine may have its own copy, under its own path; the content must be equal."""
    copies = Path(own_run.ckpt).parent / "copies"
    copies.mkdir()
    shutil.copytree(own_run.ckpt, copies / "base")
    shutil.copy(own_run.data[0], copies / "alpaca.json")
    other = replace(own_run, ckpt=str(copies / "base"), data=(str(copies / "alpaca.json"),))
    assert run_on_ranks(2, train_with_own_settings, [own_run, other]) == ["", ""]
    CHANGES[key](other)
    again = [replace(run, out_dir=own_run.out_dir + "2") for run in (own_run, other)]
    errors = run_on_ranks(2, train_with_own_settings, again)
    assert all(f"{key} is " in error and "rank 1" in error for error in errors), errors
