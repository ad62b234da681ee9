"""Text and ids: equal to the reference, no control token from text, never half a character."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama.errors import UserError
from minillama.sentencepiece_tokenizer import WordIds
from minillama.tokenizer import Stream, open_tokenizer, train_tokenizer

CONTROL = re.compile(r"</?s>|<unk>")
# What a cache of words can get wrong: runs of spaces, line breaks, the letter ▁, other scripts.
SPACES = [" ", "  ", "\n", "▁", "\t", "\r\n", "\u3000"]
WORDS = ["the", "天", "龘", "é", "1999", ":(", "</", "https://", "###"]
texts = st.lists(st.sampled_from(SPACES + WORDS) | st.text(max_size=6), max_size=12).map("".join)


@pytest.fixture(scope="module")
def chinese_tokenizer(shared):
    return open_tokenizer(shared / "tokenizers/chinese_llama2")


def streamed(tokenizer, ids):
    """The text of ids that come one by one."""
    stream = Stream(tokenizer)
    return "".join(stream.push(token) for token in ids) + stream.flush()


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
def test_ids_of_llamas_vocabulary_by_words_and_by_text_agree(
    llama_tokenizer, chinese_tokenizer, text
):
    for tokenizer in (llama_tokenizer, chinese_tokenizer):
        assert tokenizer.encode(text) == tokenizer.model.encode(text)


def test_sentencepiece_equals_transformers_on_plain_text(llama_tokenizer, shared):
    slow = slow_tokenizer(llama_tokenizer.path)

    def check(text):
        assert llama_tokenizer.encode(text) == slow.encode(text, add_special_tokens=False)

    @given(text=texts.filter(lambda text: not CONTROL.search(text)))
    @settings(max_examples=150, deadline=None)
    def check_random_text(text):
        check(text)

    check_random_text()
    records = json.loads((shared / "sft/alpaca_en_demo.json").read_text(encoding="utf-8"))
    for record in records[:150]:
        check(record["output"])


def test_the_letters_of_a_control_token_stay_text(small_tokenizer):
    for text in ("</s>", "<s>", "<unk>", "a</s>USER: b", "<s>[INST]"):
        ids = small_tokenizer.encode(text)
        assert not {small_tokenizer.bos_id, small_tokenizer.eos_id, 0} & set(ids)
        assert small_tokenizer.decode(ids) == text
    assert small_tokenizer.control_id("eos") == small_tokenizer.eos_id
    assert small_tokenizer.control_id("</s>") == small_tokenizer.eos_id
    assert small_tokenizer.control_id("<|eot_id|>") is None


def test_ids_beyond_the_vocabulary_have_no_text(small_tokenizer):
    """A checkpoint's head can have more rows than its tokenizer has tokens."""
    ids = small_tokenizer.encode("the cat")
    beyond = [small_tokenizer.size, small_tokenizer.size + 1]
    assert small_tokenizer.decode([*ids, *beyond]) == "the cat"


def test_a_vocabulary_with_tokens_across_a_line_break_is_not_split_at_words(tmp_path):
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
    """Ids arrive one at a time, and a character may need several of them."""
    ids = small_tokenizer.encode(text)
    assert streamed(small_tokenizer, ids) == small_tokenizer.decode(ids)


def test_a_control_token_in_a_stream_leaves_the_space_behind_it(small_tokenizer):
    ids = [
        *small_tokenizer.encode("the cat"),
        small_tokenizer.eos_id,
        *small_tokenizer.encode("sat on"),
    ]
    assert streamed(small_tokenizer, ids) == small_tokenizer.decode(ids) == "the cat sat on"


def test_streaming_never_prints_half_a_character(llama_tokenizer, shared):
    text = (shared / "text/sanguo_ch1-20_zh.txt").read_text(encoding="utf-8")
    # LLaMA's vocabulary has few Chinese characters. The others are three byte tokens.
    for character in sorted(set(text)):
        stream = Stream(llama_tokenizer)
        printed = [stream.push(token) for token in llama_tokenizer.encode(character)]
        assert "".join(printed) + stream.flush() == character
        assert all(part in ("", " ", character) for part in printed)


def test_a_stream_cut_inside_a_character_says_so(small_tokenizer):
    stream = Stream(small_tokenizer)
    ids = small_tokenizer.encode("龘")[:-1]
    assert [stream.push(token) for token in ids][1:] == ["", ""]
    # one U+FFFD for each byte, as in the whole text
    assert stream.flush() == small_tokenizer.decode(ids) == "\ufffd" * 2


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
    ids = [0, 2, *json_tokenizer.encode("Hello"), 1]
    assert json_tokenizer.decode(ids) == "Hello"  # control tokens are no text
    for text in ("Hello world. 天龘 é", "<|eot_id|> is text"):
        ids = json_tokenizer.encode(text)
        assert json_tokenizer.eos_id not in ids
        assert json_tokenizer.decode(ids) == text
        assert streamed(json_tokenizer, ids) == text


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
