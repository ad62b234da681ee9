"""convert.py --overwrite: no input is lost, and a command that is killed leaves a whole output."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from minillama.checkpoint.hf_reader import load_model
from minillama.checkpoint.run_directory import find_checkpoint
from minillama.conversion.merge import merge_lora
from minillama.conversion.writer import Output
from minillama.data.memmap import Dataset
from minillama.data.token_cache import open_data
from minillama.errors import UserError
from minillama.files import flush_to_disk
from minillama.hf_config import read_config
from minillama.output_directory import new_directory
from minillama.peft_adapters import read_adapter
from minillama.tokenizer import open_tokenizer, train_tokenizer
from tests.conversions import factors, plain_adapter, random_meta, run_convert, save_meta


@pytest.fixture
def inputs(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Path:
    """base, other, an adapter, a tokenizer, a text, and Meta's layout, in one folder."""
    tiny_checkpoint("base")
    tiny_checkpoint("other", seed=1)
    plain_adapter(tmp_path / "adapter", factors())
    save_meta(tmp_path / "meta", [random_meta()])
    (tmp_path / "a.model").write_bytes(train_tokenizer(["a b c d e f g"] * 9, 280))
    (tmp_path / "b.model").write_bytes(train_tokenizer(["h i j k l m n"] * 9, 280))
    (tmp_path / "text.json").write_text('[{"text": "a b c"}, {"text": "d e f"}]')
    return tmp_path


COMMANDS = [
    ("meta --input meta", "meta"),
    ("meta --reverse --input base", "base"),
    ("apply-delta --base base --delta other", "base"),
    ("apply-delta --base base --delta other", "other"),
    ("make-delta --base base --target other", "other"),
    ("merge-lora --base base --lora adapter", "base"),
    ("merge-lora --base base --lora adapter", "adapter"),
    ("tokenizer --base a.model --add b.model", "a.model"),
    ("tokenizer --base a.model --add b.model", "b.model"),
    ("data --input text.json --tokenizer a.model", "text"),
]


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("spelling", ["{}", "link/{}", "base/../{}"])
@pytest.mark.parametrize(("command", "output"), COMMANDS)
def test_an_output_that_is_an_input_is_refused_by_every_subcommand(
    command: str, output: str, spelling: str, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    Path("link").symlink_to(inputs)
    before = contents(inputs)
    words = [*command.split(), "--output", spelling.format(output), "--overwrite"]
    with pytest.raises(UserError, match="the output would replace the input"):
        run_convert(*words)
    assert contents(inputs) == before


READERS: dict[str, Callable[[Path], object]] = {
    "generate and eval": find_checkpoint,
    "an adapter as the checkpoint": lambda path: find_checkpoint(path / "adapter"),
    "its base": lambda path: read_config(path / "base"),
    "training": lambda path: load_model(path / "base"),
    "an adapter": lambda path: read_adapter(path / "adapter"),
    "a conversion": lambda path: run_convert(
        "meta", "--input", path / "meta", "--output", path / "new"
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_finds_an_output_between_its_two_renames(reader: str, inputs: Path) -> None:
    (inputs / "final").mkdir()
    for file in (inputs / "base").iterdir():
        shutil.copy(file, inputs / "final")
    for name in ("final", "base", "adapter", "meta"):
        (inputs / name).rename(inputs / f".{name}.old")
        (inputs / f".{name}.partial").mkdir()
    READERS[reader](inputs)


class Killed(BaseException):
    """What ends the process, and leaves the files as they are."""


def kill_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the given operation, of the removals and renames from now on, end the process."""
    operations = iter(range(1000))

    def dying(operation: Callable) -> Callable:
        def run(*arguments, **keywords):
            if next(operations) >= number:
                raise Killed
            return operation(*arguments, **keywords)

        return run

    monkeypatch.setattr(os, "replace", dying(os.replace))
    monkeypatch.setattr(Path, "unlink", dying(Path.unlink))


def tokenize(inputs: Path, text: str) -> None:
    (inputs / "text.json").write_text(json.dumps([{"text": text}]))
    words = ["--input", inputs / "text.json", "--tokenizer", inputs / "a.model"]
    run_convert("data", *words, "--output", inputs / "set", "--overwrite")


def stop(path: Path) -> str:
    raise Killed


@pytest.mark.parametrize("number", range(-1, 8))
def test_a_data_set_killed_while_it_is_put_in_place_is_old_or_new(
    number: int, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader comes next: training, or the same command again. -1: before the files are final."""
    tokenize(inputs, "a b c d e f g a b c")
    old = list(Dataset(inputs / "set").tokens)
    tokenize(inputs, "g f e d")
    new = list(Dataset(inputs / "set").tokens)
    tokenize(inputs, "a b c d e f g a b c")
    with monkeypatch.context() as patch:
        if number < 0:
            patch.setattr("minillama.data.memmap.sha256_of", stop)
        else:
            kill_at(number, patch)
        with suppress(Killed):
            tokenize(inputs, "g f e d")
    if number < 0:  # the old data set, whose input has changed
        opened = Dataset(inputs / "set", verify=True)
    else:
        opened = open_data([str(inputs / "set")], open_tokenizer(inputs / "a.model"))
    assert list(opened.tokens) == (old if number < 0 else new)
    tokenize(inputs, "g f e d")
    assert list(Dataset(inputs / "set", verify=True).tokens) == new
    assert not list(inputs.glob("set*.partial"))


def test_a_living_writer_is_left_alone(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minillama.data import renames

    tokenize(inputs, "a b c")
    before = contents(inputs)

    def read_while_writing(prefix: Path, parts: list[str]) -> None:
        renames.complete_dataset(prefix)
        assert Path(f"{prefix}.json.partial").is_file()
        assert contents(inputs)["set.bin"] == before["set.bin"]
        put_in_place(prefix, parts)

    put_in_place = renames.put_in_place
    monkeypatch.setattr("minillama.data.memmap.put_in_place", read_while_writing)
    tokenize(inputs, "d e f g")


def test_every_file_is_on_the_disk_before_its_directory_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill keeps the page cache, so no kill test sees this; a power loss does not."""
    flushed: list[int] = []
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(handle: int) -> None:
        flushed.append(os.fstat(handle).st_ino)
        fsync(handle)

    def record_rename(source: Path, target: Path) -> Path:
        if source.name == ".out.partial":
            inside = [source, *source.rglob("*")]
            missing = [path.name for path in inside if path.stat().st_ino not in flushed]
            events.append(f"not flushed: {missing}")
            flushed.clear()
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    with new_directory(tmp_path / "out") as directory:
        (directory / "weights").write_bytes(b"1")
        (directory / "inner").mkdir()
        (directory / "inner" / "config").write_bytes(b"2")
    assert events == ["not flushed: []"]
    assert tmp_path.stat().st_ino in flushed  # the new name itself
    flush_to_disk(tmp_path / "out")


def test_a_merge_is_never_applied_twice(inputs: Path) -> None:
    """Into its own base it would be, once per run of the same command."""
    output = Output(inputs / "base", overwrite=True)
    with pytest.raises(UserError, match="would replace the input"):
        merge_lora(inputs / "base", [inputs / "adapter"], output)
