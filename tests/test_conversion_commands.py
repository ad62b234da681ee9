"""convert.py itself: its subcommands, its help, and what a user may get wrong."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import convert
from minillama.conversion.shared_flags import parse_size
from minillama.data.memmap import Dataset
from minillama.errors import UserError
from tests.conversions import run_convert

SCRIPT = Path(convert.__file__)


def run_script(*words: str | Path) -> subprocess.CompletedProcess:
    """Run convert.py in a process of its own."""
    return subprocess.run(
        [sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=60
    )


def run_program(program: str, *words: str) -> subprocess.CompletedProcess:
    """Run a program that imports convert, with these words as sys.argv[1:]."""
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        cwd=SCRIPT.parent,
        timeout=300,
    )


HELP_WITHOUT_TORCH = """
import sys, convert
try:
    convert.main(sys.argv[1:])
except SystemExit:
    pass
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(
    "words", [[], ["--help"], *([name, "--help"] for name in convert.SUBCOMMANDS)], ids=str
)
def test_help_is_a_manual_and_needs_no_torch(words):
    done = run_program(HELP_WITHOUT_TORCH, *words)
    assert done.returncode == 0, done.stderr
    assert "Example" in done.stdout
    assert "python convert.py" in done.stdout
    if words[:1] == ["merge-lora"]:
        assert "--overwrite" in done.stdout
        assert "--dtype" in done.stdout


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mta", "unknown subcommand 'mta' (did you mean 'meta'?)"),
        ("meta", "the following arguments are required: --output, --input"),
        ("meta --input a --output b --shard 2", "argument --shard (did you mean '--shards'?)"),
        ("meta --input /none --output b", "/none: holds no consolidated.*.pth"),
        (
            "meta --input a --output b --max_shard_size 5parsecs",
            "'5parsecs' is not a size such as 5GB",
        ),
        ("meta --input a --output b --shards 0", "'0' is not a whole number above 0"),
        ("meta --input a --output b --shards 2", "--shards has no meaning without --reverse"),
        (
            "meta --input a --output b --reverse --tokenizer t",
            "--tokenizer has no meaning with --reverse",
        ),
        (
            "merge-lora --base a --lora l --output b --shards 2",
            "--shards has no meaning without --format meta",
        ),
        ("apply-delta --base /none --delta /none --output b", "/none: no such directory"),
        ("merge-lora --base /none --lora /none --output b", "/none: no such file"),
        ("sha256 /none", "/none: no such directory"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(line, message, capsys):
    with pytest.raises(SystemExit) as exit:
        convert.cli.run(convert.main, line.split())
    shown = capsys.readouterr().err
    assert exit.value.code == 2
    assert shown.startswith("error: ")
    assert message in shown
    assert shown.count("\n") == 1


def test_a_conversion_leaves_the_handler_of_sigterm_as_it_was(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError):
        run_convert("sha256", tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    with convert.exit_on_sigterm():
        assert signal.getsignal(signal.SIGTERM) is not before
        with pytest.raises(SystemExit) as exit:
            signal.raise_signal(signal.SIGTERM)
    assert exit.value.code == 143  # 128 + SIGTERM, as a shell reports it
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_script_converts_there_and_back(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint()
    meta = tmp_path / "meta"
    hf = tmp_path / "hf"
    paths = ["--input", base, "--output", meta]
    done = run_script("meta", "--reverse", *paths, "--shards", "3", "--verbose")
    assert done.returncode == 0
    assert "21 tensors" in done.stdout
    assert "peak memory" in done.stdout
    assert "model.layers.1.mlp.up_proj.weight (42, 24) torch.float32" in done.stderr

    done = run_script("meta", "--input", meta, "--output", hf, "--bin", "--dtype", "float16")
    assert done.returncode == 0
    assert (hf / "pytorch_model.bin").is_file()
    assert json.loads((hf / "config.json").read_text())["torch_dtype"] == "float16"
    assert run_script("sha256", meta, "--check", base).returncode == 0
    assert run_script("sha256", hf, "--check", base).returncode == 2


def test_sizes_are_decimal_or_binary():
    assert parse_size("5GB") == 5 * 10**9
    assert parse_size("1.5 MiB") == 3 * 2**19
    assert parse_size("700") == 700
    assert parse_size("2kb") == 2000


@pytest.fixture
def raw(tmp_path, small_tokenizer) -> list[str]:
    """`data` and its required flags, for three records of Alpaca's format."""
    records = [{"instruction": "Say hello", "input": "", "output": f"hello {i}"} for i in range(3)]
    (tmp_path / "alpaca.json").write_text(json.dumps(records))
    paths = {
        "--input": tmp_path / "alpaca.json",
        "--tokenizer": small_tokenizer.path,
        "--output": tmp_path / "set",
    }
    words = ["data"]
    for flag, path in paths.items():
        words += [flag, str(path)]
    return words


def test_raw_files_become_a_data_set_without_torch(tmp_path, raw):
    program = "import sys, convert; convert.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    done = run_program(program, *raw)
    assert done.returncode == 0, done.stderr
    dataset = Dataset(tmp_path / "set", verify=True)
    tokens = len(dataset.tokens)
    targets = int(dataset.mask.sum())
    assert 0 < targets < tokens
    counts, command = done.stdout.splitlines()
    expected = f"3 documents, {tokens} tokens, {targets} targets, 0 records skipped, "
    assert f"set: {expected}" in counts
    prefix = tmp_path / "set"
    assert command == f"next: python train.py --config 7b_lora --ckpt LLAMA_DIR --data {prefix}"


def test_options_of_data_reach_the_data_set(tmp_path, raw, capsys):
    (tmp_path / "lines.txt").write_text("Hello\nworld\n")
    lines = ["--input", tmp_path / "lines.txt", "--format", "lines"]
    run_convert(*raw, *lines, "--append-eod", "false", "--workers", "2")
    shown = capsys.readouterr().out
    assert "2 documents" in shown
    assert "--config 7b_pretrain --tokenizer" in shown
    meta = Dataset(tmp_path / "set").meta
    assert not meta["append_eod"]
    assert meta["template"] == ""

    records = [{"instruction": "a", "output": "b"}, {"instruction": 3}]
    (tmp_path / "alpaca.json").write_text(json.dumps(records))
    run_convert(*raw, "--overwrite", "--skip_bad_records", "--template", "vicuna_v1.1")
    shown = capsys.readouterr().out
    assert "1 documents" in shown
    assert "1 records skipped" in shown
    assert Dataset(tmp_path / "set").meta["template"] == "vicuna_v1.1"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "/none.json"], "/none.json: no such file or folder"),
        (["--format", "alpacca"], "invalid choice: 'alpacca'"),
        (["--format", "sharegpt"], "record 1"),
        (["--template", "vicunna"], "no template 'vicunna'"),
        (["--tokenizer", "/none.model"], "/none.model: no such tokenizer file"),
        (["--output", "{}/taken"], "taken.bin: already exists; --overwrite"),
        (["--append_eod", "maybe"], "'maybe' is not true or false"),
        (["--workers", "0"], "'0' is not a whole number above 0"),
        (["--dataset_dir", "{}", "--input", "nobody"], "nobody: no such file or folder"),
    ],
)
def test_a_mistake_in_data_leaves_nothing_behind(tmp_path, raw, flags, message):
    (tmp_path / "taken.bin").write_text("keep")
    with pytest.raises(UserError) as caught:
        run_convert(*raw, *(flag.format(tmp_path) for flag in flags))
    assert message in str(caught.value)
    files = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert files == ["alpaca.json", "taken.bin"]
    assert (tmp_path / "taken.bin").read_text() == "keep"
