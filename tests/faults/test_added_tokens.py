"""Added tokens are encoded and decoded as transformers does, or refused by name."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from minillama.errors import UserError
from minillama.tokenizer import Stream, open_tokenizer, train_tokenizer
from tests.conftest import TEXTS

FILES = ("llama/tokenizer.model", "chinese_sp/chinese_sp.model", "chinese_llama2/tokenizer.model")
# What the texts of a comparison are made of: added words, their beginnings, spaces, other scripts.
PARTS = [
    "the",
    "Wumpus",
    "Snark",
    "Jub",
    "天地",
    " ",
    "  ",
    "\n",
    "Wumpusx",
    "é",
    "▁",
    "x",
    " Jub ",
]


def token(content: str, **flags: bool) -> dict[str, Any]:
    names = ("special", "lstrip", "rstrip", "single_word", "normalized")
    return {"content": content, **{name: flags.get(name, False) for name in names}}


def decoder(first: int) -> dict[str, Any]:
    """An added_tokens_decoder with every flag."""
    tokens = [
        token("<|eot|>", special=True),
        token("Wumpus", lstrip=True),
        token("Snark", rstrip=True),
        token("Jub", single_word=True),
    ]
    return {str(first + i): tokens[i] for i in range(len(tokens))}


def random_texts(count: int = 300) -> list[str]:
    chosen = random.Random(0)
    return ["".join(chosen.choices(PARTS, k=chosen.randrange(12))) for _ in range(count)]


def changed(directory: Path, name: str, **changes: Any) -> None:
    """Set keys of a JSON file."""
    path = directory / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | changes))


@pytest.mark.parametrize("kind", ["as it is", "added_tokens.json", "decoder", "not legacy"])
@pytest.mark.parametrize("file", FILES)
def test_a_tokenizer_model_with_added_tokens_is_transformers(
    file: str, kind: str, shared: Path, tmp_path: Path
) -> None:
    """The slow tokenizer: Chinese-LLaMA-2 asks for it, as the fast one splits its words otherwise.

    It drops one of several spaces at the beginning of a text, which is kept here, so spaces are
    compared as one.
    """
    transformers = pytest.importorskip("transformers")
    source = shared / "tokenizers" / file
    shutil.copy(source, tmp_path / "tokenizer.model")
    for other in source.parent.glob("*.json"):
        shutil.copy(other, tmp_path)
    size = open_tokenizer(tmp_path).num_pieces
    changed(tmp_path, "tokenizer_config.json", tokenizer_class="LlamaTokenizer", legacy=True)
    if kind == "added_tokens.json":
        changed(tmp_path, "added_tokens.json", Wumpus=size + 1, Snark=size + 2, Wumpusx=size + 4)
    elif kind != "as it is":
        legacy = kind == "decoder"
        added = decoder(size)
        changed(tmp_path, "tokenizer_config.json", added_tokens_decoder=added, legacy=legacy)
    if kind == "not legacy" and "chinese_sp" in file:
        with pytest.raises(UserError, match="legacy = false are not supported"):
            open_tokenizer(tmp_path)
        return
    ours = open_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, use_fast=False)
    for text in random_texts():
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert [*ours.starts_with, *ids] == theirs.encode(text), text
        expected = theirs.decode(ids, skip_special_tokens=True)
        assert with_single_spaces(ours.decode(ids)) == with_single_spaces(expected)


def with_single_spaces(text: str) -> str:
    return re.sub(" +", " ", text).strip(" ")


@pytest.fixture
def added(small_tokenizer, tmp_path: Path) -> Path:
    """A small vocabulary with two added words."""
    shutil.copy(small_tokenizer.path, tmp_path / "tokenizer.model")
    size = small_tokenizer.size
    changed(tmp_path, "added_tokens.json", Wumpus=size, Snark=size + 1)
    return tmp_path


def test_added_words_are_seen_in_a_text_and_in_its_ids(added: Path, small_tokenizer) -> None:
    tokenizer = open_tokenizer(added)
    size = small_tokenizer.size
    ids = tokenizer.encode("the cat Wumpus")
    assert ids == [*small_tokenizer.encode("the cat "), size]
    the_cat, sat = small_tokenizer.encode("the cat"), small_tokenizer.encode("sat on")
    mixed = [*the_cat, size, size + 1, *sat]
    assert tokenizer.decode(mixed) == "the cat Wumpus Snark sat on"
    stream = Stream(tokenizer)
    assert "".join(map(stream.push, mixed)) + stream.flush() == tokenizer.decode(mixed)


def test_added_words_change_the_hash_that_caches_go_by(added: Path, small_tokenizer) -> None:
    before = open_tokenizer(added).sha256
    assert before != small_tokenizer.sha256
    changed(added, "added_tokens.json", Jub=small_tokenizer.size + 2)
    assert open_tokenizer(added).sha256 != before
    (added / "added_tokens.json").unlink()
    assert open_tokenizer(added).sha256 == small_tokenizer.sha256


def test_a_text_is_the_same_in_blocks_of_lines(added: Path) -> None:
    tokenizer = open_tokenizer(added)
    text = "the cat\nWumpus sat\non Snark\nthe mat"
    first, *others = text.splitlines(keepends=True)
    ids = tokenizer.encode(first)
    for line in others:
        ids += tokenizer.encode(line, follows_line_break=True)
    assert tokenizer.splits_at_lines
    assert ids == tokenizer.encode(text)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_a_word_that_looks_around_it_forbids_blocks_of_lines(added: Path, flag: str) -> None:
    size = open_tokenizer(added).num_pieces
    tokens = {str(size): token("Wumpus", **{flag: True})}
    changed(added, "tokenizer_config.json", added_tokens_decoder=tokens)
    assert not open_tokenizer(added).splits_at_lines


def test_padding_needs_no_row_and_other_special_tokens_do(added: Path, small_tokenizer) -> None:
    """Llama-2 was published with <pad> as id 32000 and an embedding of 32000 rows."""
    size = small_tokenizer.size
    (added / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    changed(added, "special_tokens_map.json", pad_token="<pad>")
    tokenizer = open_tokenizer(added)
    assert (tokenizer.size, tokenizer.sha256) == (size, small_tokenizer.sha256)
    changed(added, "special_tokens_map.json", additional_special_tokens=["<|eot_id|>"])
    tokenizer = open_tokenizer(added)
    assert (tokenizer.size, tokenizer.control_id("<|eot_id|>")) == (size + 2, size + 1)
    assert size + 1 not in tokenizer.encode("<|eot_id|>")
    assert tokenizer.decode([size + 1]) == ""


def test_the_added_tokens_of_a_tokenizer_json_beside_the_model_count(added: Path) -> None:
    (added / "added_tokens.json").unlink()
    size = open_tokenizer(added).num_pieces
    tokens = [{"id": size + 3, **token("Jub")}]
    (added / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    assert open_tokenizer(added).encode("Jub") == [size + 3]


def test_a_tokenizer_of_another_name_stands_alone(added: Path, small_tokenizer) -> None:
    (added / "tokenizer.model").rename(added / "other.model")
    assert open_tokenizer(added / "other.model").size == small_tokenizer.size


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("added_tokens.json", {"Wumpus": "x"}, "'Wumpus': 'x' is not a token id"),
        ("added_tokens.json", {"Wumpus": -1}, "-1 is not a token id"),
        ("added_tokens.json", {"▁the": 77777}, "'▁the' has the id 77777"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "expected an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"a": {}}}, "'a' is not a token id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": "x"}}, "expected a token"),
        ("tokenizer_config.json", {"eos_token": 5}, "eos_token = 5: expected a token"),
        ("tokenizer_config.json", {"bos_token": {"text": "<s>"}}, "bos_token = .*expected a token"),
        ("tokenizer_config.json", {"add_bos_token": "no"}, "'no': expected true or false"),
        ("special_tokens_map.json", {"additional_special_tokens": "x"}, "expected a list"),
        ("tokenizer.json", {"added_tokens": [{"content": "x"}]}, "has no id"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    added: Path, name: str, content: dict[str, Any], reason: str
) -> None:
    (added / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=reason) as refused:
        open_tokenizer(added)
    assert str(added) in str(refused.value)


def test_ids_of_an_unsplit_vocabulary_with_added_words_are_transformers(tmp_path: Path) -> None:
    """A vocabulary whose tokens cross line breaks is not encoded word by word."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_tokenizer([*TEXTS, "one:\ntwo:\n\nthree:\n"] * 5, 400))
    tokenizer = open_tokenizer(path)
    changed(tmp_path, "added_tokens.json", Wumpus=tokenizer.num_pieces, Jub=450)
    ours = open_tokenizer(path)
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path, legacy=True)
    for text in random_texts(100):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
