"""Chapter: convert.py itself, and the merged vocabulary."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import convert
from minillama.data.memmap import Dataset
from minillama.errors import UserError
from minillama.tokenizer import merge_vocabularies, open_tokenizer, train_tokenizer

SCRIPT = Path(convert.__file__)


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=60
    )


def test_the_chinese_vocabulary_is_the_published_file_to_the_byte(tmp_path, shared, capsys):
    llama, chinese = (
        shared / "tokenizers/llama/tokenizer.model",
        shared / "tokenizers/chinese_sp/chinese_sp.model",
    )
    convert.main(
        [
            "tokenizer",
            "--base",
            str(llama),
            "--add",
            str(chinese),
            "--output",
            str(tmp_path / "merged.model"),
        ]
    )
    assert "32000 + 17953 = 49953 pieces" in capsys.readouterr().out
    digest = hashlib.sha256((tmp_path / "merged.model").read_bytes()).hexdigest()
    assert digest == "e2676d4ca29ca1750f6ff203328d73b189321dc5776ceede037cbd36541d70c0"


def test_merging_keeps_old_ids_and_appends_what_is_new(tmp_path):
    texts = {
        "a": ["the cat sat on the mat and the dog sat on the log"] * 20,
        "b": ["dear llama, dear bear, hear the llama here"] * 20,
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(train_tokenizer(text, 290))
    a, b = (open_tokenizer(tmp_path / name).model for name in "ab")
    (tmp_path / "merged").write_bytes(merge_vocabularies(tmp_path / "a", tmp_path / "b"))
    merged = open_tokenizer(tmp_path / "merged").model
    old = [a.id_to_piece(i) for i in range(a.get_piece_size())]
    new = [
        piece for piece in (b.id_to_piece(i) for i in range(b.get_piece_size())) if piece not in old
    ]
    assert new and [merged.id_to_piece(i) for i in range(merged.get_piece_size())] == old + new
    assert {merged.get_score(len(old) + i) for i in range(len(new))} == {0.0}
    assert (
        merge_vocabularies(tmp_path / "merged", tmp_path / "b")
        == (tmp_path / "merged").read_bytes()
    )


def test_the_tokenizer_command_refuses_existing_output_and_foreign_input(tmp_path):
    (tmp_path / "a").write_bytes(train_tokenizer(["a b c d e f g"] * 9, 280))
    flags = ["tokenizer", "--base", str(tmp_path / "a"), "--add", str(tmp_path / "a")]
    with pytest.raises(UserError, match="already exists"):
        convert.main([*flags, "--output", str(tmp_path / "a")])
    (tmp_path / "b").write_bytes(b"<html>")
    with pytest.raises(UserError, match="a web page"):
        convert.main(
            [
                "tokenizer",
                "--base",
                str(tmp_path / "a"),
                "--add",
                str(tmp_path / "b"),
                "--output",
                str(tmp_path / "c"),
            ]
        )
    convert.main([*flags, "--output", str(tmp_path / "a"), "--overwrite"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_help_is_a_manual_and_needs_no_torch():
    code = "import sys, convert\ntry: convert.main(sys.argv[1:])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    for arguments in ([], ["--help"], *([name, "--help"] for name in convert.SUBCOMMANDS)):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            cwd=SCRIPT.parent,
        )
        assert (
            done.returncode == 0 and "Example" in done.stdout and "python convert.py" in done.stdout
        ), done.stderr
        assert all(
            flag in done.stdout
            for flag in ("--overwrite", "--dtype")
            if arguments[:1] == ["merge-lora"]
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mta"], "unknown subcommand 'mta' (did you mean 'meta'?)"),
        (["meta"], "the following arguments are required: --output, --input"),
        (
            ["meta", "--input", "a", "--output", "b", "--shard", "2"],
            "unknown argument --shard (did you mean '--shards'?)",
        ),
        (["meta", "--input", "/none", "--output", "b"], "/none: holds no consolidated.*.pth"),
        (
            ["meta", "--input", "a", "--output", "b", "--max_shard_size", "5 parsecs"],
            "'5 parsecs' is not a size such as 5GB",
        ),
        (
            ["meta", "--input", "a", "--output", "b", "--shards", "0"],
            "'0' is not a whole number above 0",
        ),
        (
            ["meta", "--input", "a", "--output", "b", "--shards", "2"],
            "--shards has no meaning without --reverse",
        ),
        (
            ["meta", "--input", "a", "--output", "b", "--reverse", "--tokenizer", "t"],
            "--tokenizer has no meaning with --reverse",
        ),
        (
            ["merge-lora", "--base", "a", "--lora", "l", "--output", "b", "--shards", "2"],
            "--shards has no meaning without --format meta",
        ),
        (
            ["apply-delta", "--base", "/none", "--delta", "/none", "--output", "b"],
            "/none: no such directory",
        ),
        (
            ["merge-lora", "--base", "/none", "--lora", "/none", "--output", "b"],
            "/none: no such file",
        ),
        (["sha256", "/none"], "/none: no such directory"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        convert.cli.run(convert.main, arguments)
    shown = capsys.readouterr().err
    assert (
        exit.value.code == 2
        and shown.startswith("error: ")
        and message in shown
        and shown.count("\n") == 1
    )


def test_the_script_converts_there_and_back(tmp_path, tiny_checkpoint):
    base = str(tiny_checkpoint())
    done = run(
        "meta",
        "--reverse",
        "--input",
        base,
        "--output",
        str(tmp_path / "meta"),
        "--shards",
        "3",
        "--verbose",
    )
    assert done.returncode == 0 and "21 tensors" in done.stdout and "peak memory" in done.stdout
    assert "model.layers.1.mlp.up_proj.weight (42, 24) torch.float32" in done.stderr
    done = run(
        "meta",
        "--input",
        str(tmp_path / "meta"),
        "--output",
        str(tmp_path / "hf"),
        "--bin",
        "--dtype",
        "float16",
    )
    assert done.returncode == 0 and (tmp_path / "hf" / "pytorch_model.bin").is_file()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "float16"
    assert run("sha256", str(tmp_path / "meta"), "--check", base).returncode == 0
    assert run("sha256", str(tmp_path / "hf"), "--check", base).returncode == 2


def test_sizes_are_decimal_or_binary():
    assert [convert._size(text) for text in ("5GB", "1.5 MiB", "700", "2kb")] == [
        5 * 10**9,
        3 * 2**19,
        700,
        2000,
    ]


@pytest.fixture
def raw(tmp_path, small_tokenizer) -> list[str]:
    """`data` and its required flags, for three records of Alpaca's format."""
    records = [{"instruction": "Say hello", "input": "", "output": f"hello {i}"} for i in range(3)]
    (tmp_path / "alpaca.json").write_text(json.dumps(records))
    return [
        "data",
        "--input",
        str(tmp_path / "alpaca.json"),
        "--tokenizer",
        str(small_tokenizer.path),
        "--output",
        str(tmp_path / "set"),
    ]


def test_raw_files_become_a_data_set_without_torch(tmp_path, raw):
    code = "import sys, convert; convert.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, *raw],
        capture_output=True,
        text=True,
        cwd=SCRIPT.parent,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    made, (counts, command) = Dataset(tmp_path / "set", verify=True), done.stdout.splitlines()
    tokens, targets = len(made.tokens), int(made.mask.sum())
    assert (
        0 < targets < tokens
        and f"set: 3 documents, {tokens} tokens, {targets} targets, 0 records skipped, " in counts
    )
    assert (
        command
        == f"next: python train.py --config 7b_lora --ckpt LLAMA_DIR --data {tmp_path / 'set'}"
    )


def test_options_of_data_reach_the_data_set(tmp_path, raw, capsys):
    (tmp_path / "lines.txt").write_text("Hello\nworld\n")
    convert.main(
        [
            *raw,
            "--input",
            str(tmp_path / "lines.txt"),
            "--format",
            "lines",
            "--append-eod",
            "false",
            "--workers",
            "2",
        ]
    )
    assert (
        "2 documents" in (shown := capsys.readouterr().out)
        and "--config 7b_pretrain --tokenizer" in shown
    )
    made = Dataset(tmp_path / "set").meta
    assert not made["append_eod"] and made["template"] == ""
    (tmp_path / "alpaca.json").write_text(
        '[{"instruction": "a", "output": "b"}, {"instruction": 3}]'
    )
    convert.main([*raw, "--overwrite", "--skip_bad_records", "--template", "vicuna_v1.1"])
    assert "1 documents" in (shown := capsys.readouterr().out) and "1 records skipped" in shown
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
        convert.main([*raw, *(flag.format(tmp_path) for flag in flags)])
    assert message in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "alpaca.json",
        "taken.bin",
    ]
    assert (tmp_path / "taken.bin").read_text() == "keep"
