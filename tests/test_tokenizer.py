"""Text and ids: equal to the reference, safe against control tokens in text, never half a character."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama.errors import UserError
from minillama.tokenizer import Stream, WordIds, open_tokenizer, train_tokenizer

CONTROL = re.compile(r"</?s>|<unk>")
# Text with what the word cache has to get right: runs of spaces, line breaks, the letter ▁ itself, other scripts.
parts = [
    "the",
    " ",
    "  ",
    "\n",
    "▁",
    "\t",
    "天",
    "龘",
    "é",
    "1999",
    ":(",
    "</",
    "https://",
    "###",
    "\r\n",
    "\u3000",
]
texts = st.lists(st.sampled_from(parts) | st.text(max_size=6), max_size=12).map("".join)


def slow_tokenizer(path):
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaTokenizer(str(path), legacy=True)


@given(text=texts)
@settings(max_examples=400, deadline=None)
def test_ids_of_words_laid_end_to_end_are_the_ids_of_the_text(small_tokenizer, text):
    assert small_tokenizer.words is not None
    assert small_tokenizer.encode(text) == small_tokenizer.model.encode(text)


@given(text=texts)
@settings(max_examples=300, deadline=None)
def test_ids_of_llamas_vocabulary_by_words_and_by_text_agree(shared, text):
    for tokenizer in _cached(shared):
        assert tokenizer.encode(text) == tokenizer.model.encode(text)


_OPEN = {}


def _cached(shared):
    if not _OPEN:
        for name in ("llama", "chinese_llama2"):
            _OPEN[name] = open_tokenizer(shared / "tokenizers" / name)
    return list(_OPEN.values())


def test_sentencepiece_equals_transformers_on_plain_text(shared):
    tokenizer = open_tokenizer(shared / "tokenizers/llama")
    slow = slow_tokenizer(tokenizer.path)

    @given(text=texts.filter(lambda text: not CONTROL.search(text)))
    @settings(max_examples=150, deadline=None)
    def equal(text):
        assert tokenizer.encode(text) == slow.encode(text, add_special_tokens=False)

    equal()
    for record in json.loads((shared / "sft/alpaca_en_demo.json").read_text(encoding="utf-8"))[
        :150
    ]:
        assert tokenizer.encode(record["output"]) == slow.encode(
            record["output"], add_special_tokens=False
        )


def test_the_letters_of_a_control_token_stay_text(small_tokenizer):
    for text in ("</s>", "<s>", "<unk>", "a</s>USER: b", "<s>[INST]"):
        ids = small_tokenizer.encode(text)
        assert not {small_tokenizer.bos_id, small_tokenizer.eos_id, 0} & set(ids)
        assert small_tokenizer.decode(ids) == text
    assert (
        small_tokenizer.control_id("eos")
        == small_tokenizer.eos_id
        == small_tokenizer.control_id("</s>")
    )
    assert small_tokenizer.control_id("<|eot_id|>") is None


def test_a_vocabulary_whose_pieces_reach_over_a_line_break_is_not_cut_into_words(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_tokenizer(["one:\ntwo:\n\nthree:\n"] * 9, 290))
    tokenizer = open_tokenizer(path)
    assert any("\n" in tokenizer.model.id_to_piece(token) for token in range(tokenizer.size))
    assert tokenizer.words is None
    assert tokenizer.encode("one:\ntwo") == tokenizer.model.encode("one:\ntwo")


def test_the_word_cache_is_bounded_and_forgetting_changes_nothing(small_tokenizer, monkeypatch):
    monkeypatch.setattr(WordIds, "LIMIT", 8)
    words = WordIds(small_tokenizer.model)
    monkeypatch.setattr(small_tokenizer, "words", words)
    text = " ".join(f"word{i} {'x' * i}" for i in range(100))
    assert small_tokenizer.encode(text) == small_tokenizer.model.encode(text)
    assert len(words) <= 8 and max(map(len, words)) <= WordIds.LONGEST


@given(
    text=st.text(
        alphabet=st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=40
    )
)
@settings(max_examples=200, deadline=None)
def test_streaming_decode_equals_decode(small_tokenizer, text):
    ids = small_tokenizer.encode(text)
    stream = Stream(small_tokenizer)
    assert "".join(map(stream.push, ids)) + stream.flush() == small_tokenizer.decode(ids)


def test_a_control_token_in_a_stream_leaves_the_space_behind_it(small_tokenizer):
    ids = [
        *small_tokenizer.encode("the cat"),
        small_tokenizer.eos_id,
        *small_tokenizer.encode("sat on"),
    ]
    stream = Stream(small_tokenizer)
    assert (
        "".join(map(stream.push, ids)) + stream.flush()
        == small_tokenizer.decode(ids)
        == "the cat sat on"
    )


def test_streaming_never_prints_half_a_character(shared):
    text = (shared / "text/sanguo_ch1-20_zh.txt").read_text(encoding="utf-8")
    tokenizer = open_tokenizer(
        shared / "tokenizers/llama"
    )  # knows few Chinese characters: the others are three byte pieces
    for character in sorted(set(text)):
        stream = Stream(tokenizer)
        printed = [stream.push(token) for token in tokenizer.encode(character)]
        assert "".join(printed) + stream.flush() == character
        assert all(part in ("", " ", character) for part in printed)


def test_a_stream_cut_inside_a_character_says_so(small_tokenizer):
    stream, ids = Stream(small_tokenizer), small_tokenizer.encode("龘")[:-1]
    assert [stream.push(token) for token in ids][1:] == ["", ""]
    assert (
        stream.flush() == small_tokenizer.decode(ids) == "\ufffd" * 2
    )  # one for each byte, as in the whole text


@pytest.fixture(scope="module")
def json_tokenizer(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(["Hello there, world. Hello again, world."] * 3, trainer)
    folder = tmp_path_factory.mktemp("json")
    model.save(str(folder / "tokenizer.json"))
    claims = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(claims))
    return open_tokenizer(folder)


def test_a_tokenizer_json_keeps_the_same_promises(json_tokenizer):
    assert (json_tokenizer.bos_id, json_tokenizer.eos_id) == (0, 1)
    assert json_tokenizer.control_id("<|start_header_id|>") == 2
    for text in ("Hello world. 天龘 é", "<|eot_id|> is text"):
        ids = json_tokenizer.encode(text)
        assert json_tokenizer.eos_id not in ids
        assert json_tokenizer.decode(ids) == text
        stream = Stream(json_tokenizer)
        assert "".join(map(stream.push, ids)) + stream.flush() == text


def test_a_damaged_tokenizer_config_is_named(json_tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(json_tokenizer.path.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not valid JSON"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "git-lfs pointer"),
        (b"<!DOCTYPE html><html>Not Found</html>", "web page"),
        (b"IQ== 0\nIg== 1\n", "tiktoken"),
        (b"\x00\x01 nothing of the kind", "not a SentencePiece model"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_with_its_kind(tmp_path, content, reason):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as refused:
        open_tokenizer(path)
    assert str(path) in str(refused.value)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="no such tokenizer file"):
        open_tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match=r"holds no tokenizer\.model"):
        open_tokenizer(tmp_path)
