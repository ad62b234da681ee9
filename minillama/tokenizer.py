"""Text to ids and back: SentencePiece, and `tokenizer.json` through the package `tokenizers`.

Two rules keep a conversation safe. BOS, EOS and other control tokens are added by id; no text
encodes to one, not even the letters "</s>". And the ids of BOS and EOS come from the model file
itself, whatever a tokenizer_config.json beside a tokenizer.model says.

The vocabulary of a SentencePiece LLaMA model is <unk> <s> </s>, then 256 byte tokens for characters
that no other token covers, then the learnt tokens, in which "▁" stands for a space. Encoding puts a
▁ before the text, and decoding removes it.

Encoding is fast, because no token of such a vocabulary crosses the beginning of a word: ▁ only
stands at the front of a token, and a line break in no token. So the ids of a text are the ids of
its words, one after another, and a word that was seen before is looked up.

    "the cat\\nsat"  =  ▁the | ▁cat | \\n | sat
"""

import hashlib
import io
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import sentencepiece

from minillama.errors import UserError
from minillama.files import read_json
from minillama.hub import hub_hint

FILE_NAMES = ("tokenizer.model", "tokenizer.json")

# How files begin that are often found in the place of a SentencePiece model, and what to do.
WRONG_FILES = {
    rb"\Z": "the file is empty; download it again",
    rb"version https://git-lfs": "a git-lfs pointer, not the file; run `git lfs pull`",
    rb"\s*[<{]": "a web page or JSON, not a SentencePiece model; download the file itself",
    rb"[A-Za-z0-9+/]+=* 0\n": "Meta's tiktoken format (LLaMA 3); use the tokenizer.json instead",
}


def open_tokenizer(path: Path | str) -> "Tokenizer":
    """Open a tokenizer.model or tokenizer.json: the file, or the checkpoint that holds one."""
    path = Path(path)
    candidates = [path, *(path / name for name in FILE_NAMES)]
    for file in candidates:
        if file.is_file():
            is_json = file.suffix == ".json"
            return JsonTokenizer(file) if is_json else SentencePieceTokenizer(file)
    if path.is_dir():
        names = " or ".join(FILE_NAMES)
        raise UserError(f"{path}: holds no {names}; name one with --tokenizer FILE{hub_hint(path)}")
    raise UserError(f"{path}: no such tokenizer file{hub_hint(path)}")


class SentencePieceTokenizer:
    """A LLaMA `tokenizer.model`. Equal to transformers' slow LlamaTokenizer on plain text.

    splits_at_lines: whether the ids of a text are those of its lines, one after another. Then a
    long text may be encoded in blocks of lines, all but the first with follows_line_break=True.
    """

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        for beginning, reason in WRONG_FILES.items():
            if re.match(beginning, content):
                raise UserError(f"{path}: {reason}")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: not a SentencePiece model ({reason})") from None
        self.path = path
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.size: int = self.model.get_piece_size()
        self.bos_id = _valid_id(self.model.bos_id())
        self.eos_id = _valid_id(self.model.eos_id())
        self.words = WordIds(self.model) if _splits_at_words(self.model) else None
        self.splits_at_lines = self.words is not None

    def encode(self, text: str, follows_line_break: bool = False) -> list[int]:
        """The ids of plain text, without BOS and EOS.

        follows_line_break: the text continues another one, so no ▁ is put before it.
        """
        if self.words is None or text == "":
            return self.model.encode(text)
        return self.words.encode(text if follows_line_break else " " + text)

    def control_id(self, name: str) -> int | None:
        """The id of "bos", "eos", or of a control token such as "<|eot_id|>"; None if missing."""
        named_by_role = {"bos": self.bos_id, "eos": self.eos_id}
        token = self.model.piece_to_id(name)
        named_by_letters = token if self.model.is_control(token) else None
        return named_by_role.get(name, named_by_letters)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Control tokens, and ids beyond the vocabulary, are left out."""
        return self.model.decode([token for token in ids if token < self.size])


def _valid_id(token: int) -> int | None:
    """SentencePiece gives -1 for a control token that the model does not have."""
    return token if token >= 0 else None


class WordIds(dict[str, tuple[int, ...]]):
    """A cache of the ids of words. It is emptied when it is full, so memory stays bounded."""

    WORD = re.compile("\n|[ ▁]+[^ ▁\n]*|[^ ▁\n]+")  # a line break, or spaces and what follows them
    LIMIT = 1 << 16  # words kept: some 25 MB
    LONGEST = 48  # characters of a word that is kept

    def __init__(self, model: sentencepiece.SentencePieceProcessor) -> None:
        self.model = model

    def encode(self, text: str) -> list[int]:
        """The ids of a text, to which no ▁ is added."""
        words = self.WORD.findall(text)
        return list(chain.from_iterable(map(self.__getitem__, words)))

    def __missing__(self, word: str) -> tuple[int, ...]:
        # The model puts ▁ before a text. Here it stands before a line break, and is cut off with
        # it, so that the word itself has none.
        ids = tuple(self.model.encode("\n" + word)[2:])
        if len(word) <= self.LONGEST:
            if len(self) >= self.LIMIT:
                self.clear()
            self[word] = ids
        return ids


def _splits_at_words(model: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether the ids of a text are those of its words, one after another.

    For this, the model must take text as it is, encode a line break as a byte, and have no token
    that crosses the beginning of a word.
    """
    probe = "A  b\n \tﬁ Ａ½ "  # what other models replace: runs of spaces, ligatures, wide letters
    keeps_text = model.normalize(probe) == "▁" + probe.replace(" ", "▁")
    line_break_ids = model.encode("\n")  # ▁ and the byte
    has_line_break_byte = len(line_break_ids) == 2 and model.is_byte(line_break_ids[1])
    if not (keeps_text and has_line_break_byte):
        return False
    return not any("\n" in token or "▁" in token.lstrip("▁") for token in _all_tokens(model))


def _all_tokens(model: sentencepiece.SentencePieceProcessor) -> list[str]:
    """The texts of all tokens, in order of id."""
    return model.id_to_piece(list(range(model.get_piece_size())))


class JsonTokenizer:
    """A Hugging Face `tokenizer.json` (LLaMA 3 and others), read by the package `tokenizers`.

    It has the attributes and methods of SentencePieceTokenizer.
    """

    splits_at_lines = False

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                f"{path}: needs the package `tokenizers`; pip install 'minillama[tokenizers]'"
            ) from None
        try:
            self.model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise UserError(f"{path}: not a tokenizer.json ({error})") from None
        self.model.encode_special_tokens = True  # the letters of a control token are text
        self.model.no_truncation()
        self.model.no_padding()
        self.path = path
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self.size: int = self.model.get_vocab_size(with_added_tokens=True)
        config_path = path.with_name("tokenizer_config.json")
        config = read_json(config_path) if config_path.is_file() else {}
        self.bos_id = self._id_in(config, "bos_token")
        self.eos_id = self._id_in(config, "eos_token")

    def _id_in(self, config: dict, key: str) -> int | None:
        """The id of a token that tokenizer_config.json names, as a string or as an object."""
        token = config.get(key) or ""
        if isinstance(token, dict):
            token = token["content"]
        return self.model.token_to_id(token)

    def encode(self, text: str, follows_line_break: bool = False) -> list[int]:
        assert not follows_line_break, "this vocabulary does not split at lines"
        return self.model.encode(text, add_special_tokens=False).ids

    def control_id(self, name: str) -> int | None:
        named_by_role = {"bos": self.bos_id, "eos": self.eos_id}
        return named_by_role.get(name, self.model.token_to_id(name))

    def decode(self, ids: Iterable[int]) -> str:
        return self.model.decode(list(ids), skip_special_tokens=True)


Tokenizer = SentencePieceTokenizer | JsonTokenizer


class Stream:
    """The text of ids that come one by one. Half a character is held back.

    "天" can be the three byte tokens <0xE5> <0xA4> <0xA9>: the first two pushes return "", the
    third returns "天". New ids are decoded together with the last ids that gave text, because a ▁
    is a space only within a text, and nothing at its beginning.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last ids that gave text, then those that gave none yet
        self._num_returned = 0  # of _ids, those whose text was returned

    def push(self, token: int) -> str:
        """The text that `token` completes, or "" while bytes of a character are missing."""
        self._ids.append(token)
        is_cut = self._tokenizer.decode(self._ids).endswith("\ufffd")
        return "" if is_cut else self.flush()

    def flush(self) -> str:
        """The rest of the text. Bytes that never became a character are U+FFFD."""
        returned = self._tokenizer.decode(self._ids[: self._num_returned])
        text = self._tokenizer.decode(self._ids)[len(returned) :]
        if text:
            self._ids = self._ids[self._num_returned :]
        self._num_returned = len(self._ids)
        return text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Learn a LLaMA-style tokenizer.model from texts.

    It is BPE with byte fallback, every digit is a token, and text is not normalised.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def merge_vocabularies(base: Path, added: Path) -> bytes:
    """The tokenizer.model `base` with the tokens of `added` that it does not have yet.

    Chinese-LLaMA-Alpaca made its vocabulary in this way, and the result is equal byte for byte. A
    tokenizer.model is a protobuf message that begins with its tokens; what follows them is kept.
    New tokens have score 0. That is more than any learnt token has, so SentencePiece prefers them.
    """
    base_tokens = _all_tokens(SentencePieceTokenizer(base).model)
    added_tokens = _all_tokens(SentencePieceTokenizer(added).model)
    content = base.read_bytes()
    end = 0  # of the tokens in `content`
    for _ in base_tokens:
        length, start = _read_varint(content, end + 1)
        end = start + length
    known = set(base_tokens)
    new_entries = [_token_entry(token) for token in added_tokens if token not in known]
    return content[:end] + b"".join(new_entries) + content[end:]


def _token_entry(token: str) -> bytes:
    """A token of score 0 as the entry of a protobuf message: tag, length, {text, score}."""
    text = token.encode()
    text_field = b"\x0a" + _varint(len(text)) + text  # field 1
    score_field = b"\x15" + bytes(4)  # field 2: the float 0.0
    entry = text_field + score_field
    return b"\x0a" + _varint(len(entry)) + entry  # field 1 of the model


def _read_varint(message: bytes, start: int) -> tuple[int, int]:
    """A number at message[start], and the position after it. Seven bits a byte, lowest first."""
    value = 0
    position = start
    while message[position] >= 128:  # the highest bit says that another byte follows
        value += (message[position] & 127) << 7 * (position - start)
        position += 1
    value += message[position] << 7 * (position - start)
    return value, position + 1


def _varint(value: int) -> bytes:
    if value < 128:
        return bytes([value])
    return bytes([value & 127 | 128]) + _varint(value >> 7)
