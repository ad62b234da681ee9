"""tokenizer.json and special_tokens_map.json beside converted weights: transformers reads them."""

import importlib.util
import json
from pathlib import Path

import pytest

from minillama.checkpoint.hf_writer import save_model
from minillama.conversion import tokenizer_companions
from minillama.conversion.tokenizer_companions import complete_tokenizer
from minillama.tokenizer import SentencePieceTokenizer, open_tokenizer
from tests.conftest import TEXTS, random_model
from tests.conversions import run_convert


def directory_with(path: Path, tokenizer: SentencePieceTokenizer) -> Path:
    path.mkdir()
    (path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    return path


def test_transformers_fast_tokenizer_has_the_same_ids(
    small_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = directory_with(tmp_path / "folder", small_tokenizer)
    assert complete_tokenizer(folder) == []
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for text in [*TEXTS, " ", "", "a" * 99, "hello  " * 20]:
        assert fast(text)["input_ids"] == [1, *small_tokenizer.encode(text)], text
        assert fast.decode(small_tokenizer.encode(text)) == text


def test_llamas_own_vocabulary_has_the_same_ids_on_a_whole_text(
    shared: Path, llama_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = directory_with(tmp_path / "folder", llama_tokenizer)
    assert complete_tokenizer(folder) == []
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    text = (shared / "text/sanguo_ch1-20_zh.txt").read_text()[:20_000]
    assert fast(text)["input_ids"] == [1, *llama_tokenizer.encode(text)]


def test_a_vocabulary_whose_tokens_share_scores_gets_a_note_instead(
    shared: Path, tmp_path: Path
) -> None:
    chinese = SentencePieceTokenizer(shared / "tokenizers/chinese_llama2/tokenizer.model")
    folder = directory_with(tmp_path / "folder", chinese)
    assert "tokens share scores" in complete_tokenizer(folder)[0]
    assert not (folder / "tokenizer.json").exists()


def test_other_ids_are_found_before_anything_is_written(
    small_tokenizer: SentencePieceTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merges = tokenizer_companions._merges
    monkeypatch.setattr(
        tokenizer_companions, "_merges", lambda *arguments: merges(*arguments)[::-1]
    )
    folder = directory_with(tmp_path / "folder", small_tokenizer)
    assert "would have other ids" in complete_tokenizer(folder)[0]
    assert not (folder / "tokenizer.json").exists()


def test_without_the_package_one_line_says_how_to_get_it(
    small_tokenizer: SentencePieceTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        tokenizer_companions,
        "find_spec",
        lambda name: None if name == "tokenizers" else find_spec(name),
    )
    notes = complete_tokenizer(directory_with(tmp_path / "folder", small_tokenizer))
    assert notes == [
        "note: no tokenizer.json beside tokenizer.model: "
        "pip install 'minillama[tokenizers]' makes it possible"
    ]


def test_files_that_are_there_stay(small_tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    folder = directory_with(tmp_path / "folder", small_tokenizer)
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (folder / name).write_text("{}")
    assert complete_tokenizer(folder) == []
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert (folder / "special_tokens_map.json").read_text() == "{}"


def test_a_converted_model_has_both_and_is_the_same_tokenizer(
    small_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    """The documents' list of files; our reader finds the same ids with them as without."""
    transformers = pytest.importorskip("transformers")
    model = random_model(vocab_size=small_tokenizer.size)
    save_model(model, tmp_path / "base", small_tokenizer)
    base = tmp_path / "base"
    output = tmp_path / "delta"
    run_convert("make-delta", "--base", base, "--target", base, "--output", output)
    names = json.loads((tmp_path / "delta/special_tokens_map.json").read_text())
    assert [names[role]["content"] for role in ("bos_token", "eos_token", "unk_token")] == [
        "<s>",
        "</s>",
        "<unk>",
    ]
    assert open_tokenizer(tmp_path / "delta").sha256 == open_tokenizer(tmp_path / "base").sha256
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "delta")
    for text in TEXTS:
        assert loaded(text)["input_ids"] == [1, *small_tokenizer.encode(text)]
