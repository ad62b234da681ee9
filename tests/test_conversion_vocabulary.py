"""A merged vocabulary: old tokens keep their ids, new ones are appended."""

import hashlib
from pathlib import Path

import pytest

from minillama.conversion.vocabulary import merge_tokenizers
from minillama.errors import UserError
from minillama.tokenizer import open_tokenizer, train_tokenizer
from tests.conversions import run_convert

CHINESE_LLAMA = "e2676d4ca29ca1750f6ff203328d73b189321dc5776ceede037cbd36541d70c0"


def tokens_of(path: Path) -> list[str]:
    model = open_tokenizer(path).model
    return [model.id_to_piece(i) for i in range(model.get_piece_size())]


def test_the_chinese_vocabulary_is_the_published_file_to_the_byte(tmp_path, shared, capsys):
    llama = shared / "tokenizers/llama/tokenizer.model"
    chinese = shared / "tokenizers/chinese_sp/chinese_sp.model"
    out = tmp_path / "merged.model"
    run_convert("tokenizer", "--base", llama, "--add", chinese, "--output", out)
    assert "32000 + 17953 = 49953 tokens" in capsys.readouterr().out
    assert hashlib.sha256(out.read_bytes()).hexdigest() == CHINESE_LLAMA


def test_merging_keeps_old_ids_and_appends_what_is_new(tmp_path):
    cats = ["the cat sat on the mat and the dog sat on the log"] * 20
    llamas = ["dear llama, dear bear, hear the llama here"] * 20
    (tmp_path / "a").write_bytes(train_tokenizer(cats, 290))
    (tmp_path / "b").write_bytes(train_tokenizer(llamas, 290))
    merged = merge_tokenizers(tmp_path / "a", tmp_path / "b", tmp_path / "merged")
    old = tokens_of(tmp_path / "a")
    new = [token for token in tokens_of(tmp_path / "b") if token not in old]
    assert new
    assert tokens_of(tmp_path / "merged") == old + new
    assert (merged.base_size, merged.size) == (len(old), len(old) + len(new))
    model = open_tokenizer(tmp_path / "merged").model
    assert {model.get_score(len(old) + i) for i in range(len(new))} == {0.0}

    merge_tokenizers(tmp_path / "merged", tmp_path / "b", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "merged").read_bytes()


def test_existing_output_and_foreign_input_are_refused(tmp_path):
    a = tmp_path / "a"
    a.write_bytes(train_tokenizer(["a b c d e f g"] * 9, 280))
    (tmp_path / "old").write_bytes(b"old")
    with pytest.raises(UserError, match="already exists"):
        merge_tokenizers(a, a, tmp_path / "old")
    (tmp_path / "link").symlink_to(a)
    for output in (a, tmp_path / "link", tmp_path / ".." / tmp_path.name / "a"):
        with pytest.raises(UserError, match="would replace the input"):
            merge_tokenizers(a, a, output, overwrite=True)
    (tmp_path / "b").write_bytes(b"<html>")
    with pytest.raises(UserError, match="a web page"):
        merge_tokenizers(a, tmp_path / "b", tmp_path / "c")
    merge_tokenizers(a, a, tmp_path / "old", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "link", "old"]
