"""What is read is what was written: manifests of models, digests of records, files of one model."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from minillama.checkpoint.hf_reader import load_model
from minillama.checkpoint.hf_writer import save_model
from minillama.checkpoint.run_directory import find_checkpoint
from minillama.conversion.checksums import check
from minillama.conversion.delta import make_delta
from minillama.conversion.writer import Output
from minillama.errors import UserError
from tests.conftest import random_model, random_tokens
from tests.faults.commands import Outcome, run_command
from tests.faults.scenarios import EVAL, GENERATE, TRAIN, write_world

TALK = "generate.py --ckpt run --greedy --max_new_tokens 2 --prompt a --device cpu"
LARGE = "model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, and one that was stopped after step 2."""
    place = tmp_path_factory.mktemp("whole")
    folder = place / "world"
    write_world(folder)
    assert run_command(TRAIN, folder, place / "report").code == 0
    shutil.copytree(folder / "run", folder / "stopped")
    shutil.rmtree(folder / "stopped/final")
    return folder


@pytest.fixture
def world(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "world")
    return tmp_path / "world"


def flip_bit(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def run(command: str, world: Path) -> Outcome:
    return run_command(command, world, world.parent / "report")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "minillama.json", LARGE])
def test_a_flipped_bit_in_final_is_refused_with_the_files_name(name: str, world: Path) -> None:
    assert run(TALK, world).code == 0
    flip_bit(world / "run/final" / name)
    for command in (TALK, EVAL.replace("base", "run"), f"{TRAIN} --ckpt run --out_dir b"):
        outcome = run(command, world)
        assert outcome.code == 2
        assert f"final/{name}: not the file that manifest.json was written for" in outcome.stderr


def test_a_file_that_final_lacks_is_refused(world: Path) -> None:
    (world / "run/final/generation_config.json").unlink()
    with pytest.raises(UserError, match=r"generation_config\.json: not the file"):
        find_checkpoint(world / "run")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_of_final_cut_short_is_refused(share: float, world: Path) -> None:
    for path in (world / "run/final").iterdir():
        raw = path.read_bytes()
        path.write_bytes(raw[: int(share * len(raw))])
        with pytest.raises(UserError, match=r"final/"):
            find_checkpoint(world / "run")
        path.write_bytes(raw)


def test_a_copy_with_new_times_is_whole_and_a_manifest_may_be_deleted(world: Path) -> None:
    for path in (world / "run/final").iterdir():
        os.utime(path, (1, 1))
    assert find_checkpoint(world / "run") == world / "run/final"
    flip_bit(world / "run/final/config.json")
    (world / "run/final/manifest.json").unlink()
    assert find_checkpoint(world / "run") == world / "run/final"


def test_the_manifest_of_final_is_one_for_convert(world: Path) -> None:
    final = world / "run/final"
    assert check(final, final / "manifest.json").num_tensors > 0
    flip_bit(final / LARGE)
    with pytest.raises(UserError, match=r"model\.safetensors: its content is not what .*manifest"):
        check(final, final / "manifest.json")


def test_a_manifest_of_another_program_says_nothing(tmp_path: Path) -> None:
    save_model(random_model(), tmp_path / "model")
    (tmp_path / "model/manifest.json").write_text('{"schemaVersion": 2}')
    assert find_checkpoint(tmp_path / "model") == tmp_path / "model"


def test_without_final_the_newest_checkpoint_is_used_and_named(world: Path) -> None:
    outcome = run(TALK.replace("run", "stopped"), world)
    assert outcome.code == 0
    assert "stopped: has no final/; its newest checkpoint is used" in outcome.stderr
    assert "step-000002" in outcome.stderr


def test_a_damaged_checkpoint_is_not_used_in_the_place_of_final(world: Path) -> None:
    flip_bit(world / "stopped/checkpoints/step-000002" / LARGE)
    outcome = run(TALK.replace("run", "stopped"), world)
    assert outcome.code == 2
    assert "step-000002/model.safetensors: not the file" in outcome.stderr


def edit_a_digit(path: Path) -> None:
    """Change the last digit of the last record, before its digest."""
    content, digest = path.read_text().rsplit(', "digest"', 1)
    position = max(i for i, character in enumerate(content) if character.isdigit())
    digit = (int(content[position]) + 1) % 10
    path.write_text(f'{content[:position]}{digit}{content[position + 1 :]}, "digest"{digest}')


def test_an_edited_digit_in_predictions_is_refused(world: Path) -> None:
    assert run(EVAL, world).code == 0
    edit_a_digit(world / "scores/predictions.jsonl")
    outcome = run(EVAL, world)
    assert outcome.code == 2
    assert "scores/predictions.jsonl: the record" in outcome.stderr
    assert "is not what was written" in outcome.stderr


def test_an_edited_unfinished_completion_is_refused(world: Path) -> None:
    points = run(GENERATE, world).operations
    (world / "out.jsonl").unlink()
    last_write = max(i for i, name in enumerate(points) if name.startswith("write out.jsonl.part"))
    run_command(GENERATE, world, world.parent / "report", "kill", last_write)
    edit_a_digit(world / "out.jsonl.partial")
    outcome = run(GENERATE, world)
    assert outcome.code == 2
    assert "out.jsonl.partial: the record" in outcome.stderr


def test_predictions_of_before_digests_go_on(world: Path) -> None:
    assert run(EVAL, world).code == 0
    path = world / "scores/predictions.jsonl"
    expected = path.read_text()
    lines = [json.loads(line) for line in expected.splitlines()]
    for line in lines:
        del line["digest"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:1]))
    assert run(EVAL, world).code == 0
    assert path.read_text() == expected


@pytest.mark.parametrize("is_bin", [False, True], ids=["safetensors", "bin"])
def test_a_whole_file_beside_an_old_index_is_read_as_transformers_does(
    is_bin: bool, tiny_checkpoint: Callable, tmp_path: Path
) -> None:
    """Someone saved a new model over an old one that had shards."""
    old = tiny_checkpoint("old", seed=1, tie_embeddings=False)
    new = tiny_checkpoint("new", seed=2, tie_embeddings=False)
    zero = random_model(tie_embeddings=False)
    for parameter in zero.parameters():
        parameter.data.zero_()
    save_model(zero, tmp_path / "zero")
    both = tmp_path / "both"
    make_delta(tmp_path / "zero", old, Output(both, max_shard_bytes=5000, bin=is_bin))
    make_delta(tmp_path / "zero", new, Output(tmp_path / "whole", bin=is_bin))
    assert list(both.glob("*.index.json"))
    for path in (tmp_path / "whole").iterdir():
        shutil.copy(path, both / path.name)
    tokens = random_tokens(1, 9)
    theirs = AutoModelForCausalLM.from_pretrained(both)(tokens).logits
    model = load_model(both)
    torch.testing.assert_close(model.logits(model(tokens)), theirs)
