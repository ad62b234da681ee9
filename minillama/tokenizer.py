"""Text to ids and back: SentencePiece, and `tokenizer.json` through the package `tokenizers`.

One rule keeps a conversation safe: BOS, EOS and other special tokens are added by id, and no text
encodes to one, not even the letters "</s>". In everything else ids and texts are those of
transformers, with the files beside the tokenizer (added_tokens.py).
"""

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from minillama.added_tokens import AddedToken
from minillama.errors import UserError
from minillama.hub import hub_hint
from minillama.json_tokenizer import JsonTokenizer
from minillama.sentencepiece_tokenizer import SentencePieceTokenizer, all_tokens

FILE_NAMES = ("tokenizer.model", "tokenizer.json")


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


class TokenIds:
    """Stands in for a tokenizer that is not there: what is read and written is ids, not text.

    It has the attributes and methods of a tokenizer.
    """

    size = 0
    sha256 = ""
    bos_rule = "no tokenizer"
    splits_at_lines = False

    def __init__(self, path: Path) -> None:
        self.path = path  # where there is no tokenizer
        self.bos_id: int | None = None
        self.eos_id: int | None = None
        self.starts_with: list[int] = []
        self.named: dict[str, str] = {}

    def encode(self, text: str, follows_line_break: bool = False) -> list[int]:
        raise UserError(f"{self.path}: has no tokenizer for {text!r}; name one with --tokenizer")

    def encode_behind_control(self, text: str) -> list[int]:
        return self.encode(text)

    def added_tokens(self) -> list[AddedToken]:
        return []

    def control_id(self, name: str) -> int | None:
        return None

    def name_of(self, token: int) -> str:
        return str(token)

    def decode(self, ids: Iterable[int]) -> str:
        """The ids themselves, such as "1 15043"."""
        return " ".join(map(str, ids))


Tokenizer = SentencePieceTokenizer | JsonTokenizer | TokenIds


def describe_bos(tokenizer: Tokenizer) -> str:
    """What a text begins with, and what decides that."""
    names = [tokenizer.name_of(token) for token in tokenizer.starts_with]
    start = f"BOS {names[0]}" if names else "no BOS"
    return f"{start} (by {tokenizer.bos_rule})"


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
    base_tokens = all_tokens(SentencePieceTokenizer(base).model)
    added_tokens = all_tokens(SentencePieceTokenizer(added).model)
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
