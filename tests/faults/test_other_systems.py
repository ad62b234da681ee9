"""Other machines and other people's paths: Windows, no home, no UTF-8, names of the Hub, YAML."""

import ast
import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import generate
import train
from minillama import presets
from minillama.data.token_cache import open_data
from minillama.errors import UserError
from minillama.generation.loading import find_base
from minillama.hf_config import read_config
from minillama.peft_adapters import read_adapter_config
from minillama.tokenizer import open_tokenizer
from tests.test_architecture import SOURCES, TREES
from tests.test_errors import error_line

ROOT = Path(__file__).parents[2]
BOM = b"\xef\xbb\xbf"
UNIX = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "readline"}
# A process that runs this is given commands, one a word, and runs them one after the other.
# So torch is loaded once.
SCRIPTS = """
import runpy, sys
for command in sys.argv[1:]:
    sys.argv = command.split()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""
# In a process that runs this, these modules cannot be imported, as on Windows.
SCRIPTS_WITHOUT_UNIX = f"""
import sys
sys.modules |= dict.fromkeys({sorted(UNIX)})
{SCRIPTS}
"""


def run(*arguments: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        timeout=300,
    )


def test_a_run_and_a_completion_need_no_module_of_unix(inputs: Path, tmp_path: Path) -> None:
    """On Windows there is neither fcntl nor resource: no locks, and no peak memory."""
    training = (
        f"train.py --ckpt {inputs}/base --data {inputs}/alpaca.json --max_length 96 --max_steps 1 "
        f"--template default --cache_dir {inputs}/cache --out_dir {tmp_path}/run --device cpu"
    )
    output = tmp_path / "answers.jsonl"
    generation = (
        f"generate.py --ckpt {tmp_path}/run --prompt a --greedy --max_new_tokens 2 "
        f"--output {output} --device cpu"
    )
    conversion = f"convert.py meta --reverse --input {inputs}/base --output {tmp_path}/meta"
    done = run("-c", SCRIPTS_WITHOUT_UNIX, training, generation, conversion)
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "meta").is_dir()
    assert json.loads(output.read_text())["completion_ids"]


def test_a_conversation_and_the_doctor_need_no_module_of_unix(inputs: Path) -> None:
    chat = f"generate.py --ckpt {inputs}/base --chat --greedy --max_new_tokens 2 --device cpu"
    doctor = "minillama/doctor.py --device cpu"
    commands = (chat, doctor, "eval.py --help")
    done = run("-c", SCRIPTS_WITHOUT_UNIX, *commands, stdin=b"one\ntwo\nq\n")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.count(b"tokens/s)") == 2
    assert b"every answer is right" in done.stdout
    assert b"usage: python eval.py" in done.stdout


def imports_at_import(body: list[ast.stmt]) -> Iterator[str]:
    """The modules that are imported when a file is, functions and guarded blocks aside."""
    for statement in body:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            yield statement.module or ""
        elif isinstance(statement, ast.ClassDef | ast.With | ast.If):
            yield from imports_at_import(statement.body)


def test_no_file_imports_a_module_of_unix_when_it_is_imported() -> None:
    for path in SOURCES:
        found = UNIX & set(imports_at_import(TREES[path].body))
        assert not found, f"{path} imports {found}: Windows has none"


@pytest.mark.parametrize("encoding", ["ascii", "gbk"])
def test_training_and_a_conversation_print_in_any_encoding(
    encoding: str, inputs: Path, tmp_path: Path
) -> None:
    """Chinese data, a Chinese message, and the progress bar."""
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": "玄德曰", "output": "é 备"}] * 3), encoding="utf-8")
    training = (
        f"train.py --ckpt {inputs}/base --data {data} --max_length 96 --max_steps 1 "
        f"--template default --cache_dir {tmp_path}/cache --out_dir {tmp_path}/run --device cpu"
    )
    chat = f"generate.py --ckpt {tmp_path}/run --chat --greedy --max_new_tokens 2 --device cpu"
    message = "玄德".encode(encoding, "replace")
    commands = (training, f"{training} --show_batch", chat)
    done = run("-c", SCRIPTS, *commands, stdin=message + b"\nq\n", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr.decode(encoding)
    assert b"Traceback" not in done.stderr
    assert b"tokens/s)" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "gbk"])
@pytest.mark.parametrize("script", ["train.py", "generate.py", "eval.py", "convert.py"])
def test_help_is_printed_in_any_encoding(script: str, encoding: str) -> None:
    done = run(script, "--help", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode(encoding)


def test_text_that_a_terminal_cannot_show_is_printed_as_numbers() -> None:
    code = "from minillama import cli; cli.run(lambda words: print(words[0]), ['caf\\u00e9'])"
    done = run("-c", code, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout.decode().strip()) == (0, r"caf\xe9")


def test_without_a_home_the_cache_asks_for_a_folder(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(user_id: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {user_id}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    tokenizer = open_tokenizer(inputs / "tokenizer.model")
    with pytest.raises(UserError, match=r"no home directory .* --cache_dir DIR"):
        open_data([str(inputs / "alpaca.json")], tokenizer)


def test_a_home_that_cannot_be_made_is_answered_with_the_flag_that_names_another_folder(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file/home"))
    tokenizer = open_tokenizer(inputs / "tokenizer.model")
    with pytest.raises(UserError, match=r"file/home/\.cache/minillama: .* --cache_dir DIR"):
        open_data([str(inputs / "alpaca.json")], tokenizer)
    monkeypatch.setenv("HOME", str(tmp_path / "new"))
    open_data([str(inputs / "alpaca.json")], tokenizer)
    assert list((tmp_path / "new/.cache/minillama").iterdir())


def test_a_byte_order_mark_is_no_part_of_a_file(inputs: Path, tmp_path: Path) -> None:
    """Notepad writes one, and so do PowerShell and Excel."""
    config = (inputs / "base/config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(BOM + config)
    assert read_config(tmp_path) == read_config(inputs / "base")
    (tmp_path / "recipe.toml").write_bytes(BOM + b"[train]\nlearning_rate = 1.0\n")
    assert presets.read_tree(tmp_path / "recipe.toml") == {"train.learning_rate": 1.0}
    data = tmp_path / "data"
    data.mkdir()
    (data / "records.json").write_bytes(BOM + (inputs / "alpaca.json").read_bytes())
    (data / "dataset_info.json").write_bytes(BOM + b'{"named": {"file_name": "records.json"}}')
    command = (
        f"--ckpt {inputs}/base --data named --dataset_dir {data} --max_length 96 --max_steps 1 "
        f"--template default --cache_dir {tmp_path}/cache --out_dir {tmp_path}/run --device cpu"
    )
    train.main(command.split())
    assert (tmp_path / "run/final").is_dir()


NAME = "meta-llama/Llama-2-7b-hf"
DOWNLOAD = f"`hf download {NAME} --local-dir Llama-2-7b-hf`, and give the path Llama-2-7b-hf"


def test_a_name_of_the_hub_is_answered_with_the_command_that_downloads_it(
    capsys: pytest.CaptureFixture, inputs: Path, tmp_path: Path
) -> None:
    prompt = ["--prompt", "a"]
    assert DOWNLOAD in error_line(capsys, generate.main, ["--ckpt", NAME, *prompt])
    with_lora = ["--ckpt", str(inputs / "base"), "--lora", NAME, *prompt]
    assert DOWNLOAD in error_line(capsys, generate.main, with_lora)
    training = ["--ckpt", NAME, "--data", "a.json", "--out_dir", str(tmp_path / "run")]
    assert DOWNLOAD in error_line(capsys, train.main, training)
    for read in (open_tokenizer, lambda path: find_base(path, str(path)), read_adapter_config):
        with pytest.raises(UserError) as error:
            read(Path(NAME))
        assert DOWNLOAD in str(error.value)


def test_only_a_name_of_the_hub_is_taken_for_one(tmp_path: Path, monkeypatch) -> None:
    """runs/a is a path here where runs exists."""
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name in ("runs/a", "/a/b", "../a/b", "a", "a/b/c"):
        with pytest.raises(UserError) as error:
            open_tokenizer(name)
        assert "hf download" not in str(error.value)


def test_a_folder_of_the_hubs_cache_is_answered_with_the_one_inside(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = tmp_path / "models--meta-llama--Llama-2-7b-hf"
    command = ["--ckpt", str(root), "--prompt", "a", "--greedy", "--max_new_tokens", "1"]
    root.mkdir()
    assert DOWNLOAD in error_line(capsys, generate.main, command)
    snapshot = root / "snapshots/0123abcd"
    shutil.copytree(inputs / "base", snapshot)
    assert f"give {snapshot}" in error_line(capsys, generate.main, command)
    command[1] = str(snapshot)
    generate.main(command)
