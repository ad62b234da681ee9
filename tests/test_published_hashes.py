"""Files beside a published list of sha256: they are one model's, or the error says what differs."""

import hashlib
from pathlib import Path

import pytest

from minillama.conversion.published_hashes import check_published, read_list
from minillama.errors import UserError
from minillama.tokenizer import merge_vocabularies
from tests.conversions import run_convert

CONTENTS = {
    name: f"the bytes of {name}".encode()
    for name in ("7b-0", "13b-0", "13b-1", "adapter", "other adapter", "vocabulary")
}
DIGITS = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENTS.items()}
# In the layout of Chinese-LLaMA-Alpaca's SHA256.md, with other models.
MARKDOWN = f"""
# SHA256

### Original (by its authors)

#### consolidated.*.pth format (original)

| Model | Parts | SHA256 (consolidated.*.pth) |
| ----- | :---: | --------------------------- |
| 7B    |  00   | {DIGITS["7b-0"]} |
| 13B   |  00   | {DIGITS["13b-0"]} |
| 13B   |  01   | {DIGITS["13b-1"]} |

#### Tokenizer.model

| Model Type | SHA256 |
| ---------- | ------ |
| 7B, 13B    | {DIGITS["vocabulary"]} |

### Merged files (consolidated.*.pth)

| Model  | SHA256 (PyTorch >= 1.13.0) |
| ------ | -------------------------- |
| Merged | {DIGITS["13b-1"].upper()}<br/>{DIGITS["7b-0"]} |
| Other  | TBA |

#### LoRA weight file: adapter_model.bin

| LoRA Model (adapter_model.bin) | SHA256 |
| ------------------------------ | ------ |
| LoRA-7B | {DIGITS["adapter"]} |
"""


@pytest.fixture
def published(tmp_path: Path) -> Path:
    (tmp_path / "SHA256.md").write_text(MARKDOWN)
    return tmp_path / "SHA256.md"


def directory(tmp_path: Path, **files: str) -> Path:
    """A directory with these contents, by the first word of a file's name."""
    names = {
        "zero": "consolidated.00.pth",
        "one": "consolidated.01.pth",
        "adapter": "adapter_model.bin",
        "vocabulary": "tokenizer.model",
    }
    folder = tmp_path / "files"
    folder.mkdir()
    for key, content in files.items():
        (folder / names[key]).write_bytes(CONTENTS[content])
    return folder


@pytest.mark.parametrize(
    ("files", "models"),
    [
        ({"zero": "7b-0"}, {"consolidated.*.pth": "7B"}),
        (
            {"zero": "13b-0", "one": "13b-1", "vocabulary": "vocabulary"},
            {"consolidated.*.pth": "13B", "tokenizer.model": "7B, 13B"},
        ),
        ({"zero": "13b-1", "one": "7b-0"}, {"consolidated.*.pth": "Merged"}),
        ({"adapter": "adapter"}, {"adapter_model.bin": "LoRA-7B"}),
    ],
)
def test_the_files_of_a_kind_are_those_of_one_model(
    files: dict[str, str], models: dict[str, str], published: Path, tmp_path: Path
) -> None:
    assert check_published(directory(tmp_path, **files), published).models == models


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (
            {"adapter": "other adapter"},
            f"adapter_model.bin: its sha256 is {DIGITS['other adapter']}",
        ),
        ({"zero": "13b-0"}, "of 13B, 1 of the 2 files"),
        ({"zero": "13b-0", "one": "7b-0"}, "files of several models"),
        ({}, "holds none of the files"),
    ],
)
def test_other_files_are_refused_by_name(
    files: dict[str, str], named: str, published: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=named):
        check_published(directory(tmp_path, **files), published)


def test_the_command_names_the_model(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = directory(tmp_path, zero="13b-0", one="13b-1")
    run_convert("sha256", folder, "--check", published)
    assert f"consolidated.*.pth: 2 files of 13B, as {published} says" in capsys.readouterr().out


def test_what_sha256sum_writes_is_read_too(tmp_path: Path) -> None:
    sums = tmp_path / "sums.txt"
    sums.write_text(f"{DIGITS['adapter']}  lora/adapter_model.bin\n")
    folder = directory(tmp_path, adapter="adapter")
    assert check_published(folder, sums).models == {"adapter_model.bin": ""}
    (folder / "adapter_model.bin").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"adapter_model.bin: its sha256 is .* none that"):
        check_published(folder, sums)


def test_a_text_without_hashes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Hello\n")
    with pytest.raises(UserError, match="lists no sha256 of files"):
        read_list(tmp_path / "README.md")


def test_the_published_hash_of_chinese_llamas_vocabulary_is_found(
    shared: Path, tmp_path: Path
) -> None:
    """The merged vocabulary has the sha256 that Chinese-LLaMA-Alpaca published for it."""
    digits = "e2676d4ca29ca1750f6ff203328d73b189321dc5776ceede037cbd36541d70c0"
    table = f"#### Tokenizer.model\n\n| Model | SHA256 |\n| - | - |\n| LLaMA | {digits} |\n"
    (tmp_path / "SHA256.md").write_text(table)
    folder = tmp_path / "merged"
    folder.mkdir()
    tokenizers = shared / "tokenizers"
    added = tokenizers / "chinese_sp/chinese_sp.model"
    merged = merge_vocabularies(tokenizers / "llama/tokenizer.model", added)
    (folder / "tokenizer.model").write_bytes(merged)
    assert check_published(folder, tmp_path / "SHA256.md").models == {"tokenizer.model": "LLaMA"}
