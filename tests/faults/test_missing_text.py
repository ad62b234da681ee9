"""Ids without a tokenizer, chat templates of other programs, and text that is not UTF-8."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minillama.errors import UserError

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/model"
MAIN = runpy.run_path(str(ROOT / "generate.py"))["main"]
GREEDY = ["--greedy", "--max_new_tokens", "6"]
IDS = ["--prompt_ids", "1 342 345 282", *GREEDY]


@pytest.fixture
def without_tokenizer(tmp_path: Path) -> Path:
    """A model directory of config.json and weights."""
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, tmp_path / "model")
    return tmp_path / "model"


def test_prompt_ids_need_no_tokenizer(without_tokenizer: Path, tmp_path: Path, capsys) -> None:
    """The same ids come out as with one; they are all that comes out."""
    MAIN(["--ckpt", str(GOLDEN), *IDS, "--output", str(tmp_path / "with.jsonl")])
    ids = json.loads((tmp_path / "with.jsonl").read_text())["completion_ids"][0]
    capsys.readouterr()
    MAIN(["--ckpt", str(without_tokenizer), *IDS])
    out, err = capsys.readouterr()
    assert out == " ".join(map(str, ids)) + "\n"
    assert "has no tokenizer, so token ids are written" in err
    MAIN(["--ckpt", str(without_tokenizer), *IDS, "--output", str(tmp_path / "without.jsonl")])
    record = json.loads((tmp_path / "without.jsonl").read_text())
    assert (record["completion_ids"], record["prompt"]) == ([ids], "1 342 345 282")
    capsys.readouterr()
    MAIN(["--ckpt", str(without_tokenizer), *IDS, "--stream"])
    assert capsys.readouterr().out == out


def test_prompt_ids_need_no_tokenizer_that_can_be_read(without_tokenizer: Path, capsys) -> None:
    (without_tokenizer / "tokenizer.model").write_bytes(b"{")
    MAIN(["--ckpt", str(without_tokenizer), *IDS])
    out, err = capsys.readouterr()
    assert "not a SentencePiece model; download the file itself, so token ids are written" in err
    assert all(word.isdecimal() for word in out.split())


@pytest.mark.parametrize(
    "flags", [["--prompt", "hello"], ["--chat"], [*IDS, "--stop", "x"]], ids=lambda flags: flags[0]
)
def test_text_needs_a_tokenizer(without_tokenizer: Path, flags: list[str]) -> None:
    with pytest.raises(UserError, match=r"holds no tokenizer\.model or .* --tokenizer FILE"):
        MAIN(["--ckpt", str(without_tokenizer), *flags])


def test_a_chat_without_a_template_says_what_to_do(tmp_path: Path, capsys, monkeypatch) -> None:
    shutil.copytree(GOLDEN, tmp_path / "model")
    (tmp_path / "model/minillama.json").unlink(missing_ok=True)

    def end_of_input(_: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end_of_input)
    MAIN(["--ckpt", str(tmp_path / "model"), "--chat"])
    note = capsys.readouterr().out.splitlines()[0]
    assert note.startswith("note: no chat template is known")
    assert note.endswith("choose one with --template NAME")


def run_generate(*flags: str | bytes, stdin: bytes = b"") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "generate.py", "--ckpt", str(GOLDEN), *GREEDY, *flags],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        timeout=300,
    )


@pytest.mark.parametrize("flag", ["--prompt", "--system"])
def test_bytes_that_are_not_utf8_in_a_flag_are_refused_in_one_line(flag: str) -> None:
    others = ["--chat"] if flag == "--system" else []
    done = run_generate(flag, b"caf\xe9", *others)
    assert done.returncode == 2
    last = done.stderr.decode().splitlines()[-1]
    assert last.startswith("error: ") and "lone surrogate \\udce9" in last
    assert b"Traceback" not in done.stderr


def test_the_chat_goes_on_after_bytes_that_are_not_utf8() -> None:
    lines = [b"hello", b"caf\xe9 \xff\xfe", "天\n".encode()[:-1], b"\xed\xa0\xbd", b"hello"]
    done = run_generate("--chat", "--template", "alpaca", stdin=b"\n".join(lines) + b"\n")
    out = done.stdout.decode()
    assert done.returncode == 0, done.stderr
    assert out.count("tokens/s") == 3
    assert out.count("lone surrogate") == 2
