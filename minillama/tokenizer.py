"""Text to ids and back: SentencePiece, and `tokenizer.json` through the optional `tokenizers` package.

Two rules keep a conversation safe. Control tokens (begin, end) are ids that callers add by number; no text, not even the
letters "</s>", ever encodes to one. And ids come from the model file itself, whatever a tokenizer_config.json beside it claims.

A SentencePiece LLaMA vocabulary is <unk> <s> </s>, 256 byte pieces for what no other piece covers, then the learnt pieces, in
which "▁" stands for a space. Encoding puts a ▁ before the text; decoding takes it off again.

Encoding is fast because no piece reaches over the start of a word: ▁ stands only in front, a line break in no piece at all. So
a text's ids are its words' ids laid end to end, and a word seen before is looked up instead of merged again.

    "the cat\nsat"  =  ▁the | ▁cat | \n | sat
"""

import hashlib
import io
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import sentencepiece

from minillama.errors import UserError, read_json


def open_tokenizer(path: Path | str) -> "Tokenizer":
    """Open a tokenizer.model or tokenizer.json, given as the file or the checkpoint directory that holds one."""
    path, names = Path(path), ("tokenizer.model", "tokenizer.json")
    found = next(
        (file for file in [path, *(path / name for name in names)] if file.is_file()), None
    )
    if found is None:
        lacks = (
            f"holds no {' or '.join(names)}; name one with --tokenizer FILE"
            if path.is_dir()
            else "no such tokenizer file"
        )
        raise UserError(f"{path}: {lacks}")
    return JsonTokenizer(found) if found.suffix == ".json" else SentencePieceTokenizer(found)


FOREIGN = {  # how a file begins that is no SentencePiece model, and what it is instead
    rb"\Z": "the file is empty; download it again",
    rb"version https://git-lfs": "a git-lfs pointer, not the file; run `git lfs pull` or download it again",
    rb"\s*[<{]": "a web page or JSON, not a SentencePiece model; download the file itself",
    rb"[A-Za-z0-9+/]+=* 0\n": "Meta's tiktoken format (LLaMA 3), not SentencePiece; use the Hugging Face tokenizer.json instead",
}


class SentencePieceTokenizer:
    """A LLaMA `tokenizer.model`. Equals transformers' slow LlamaTokenizer on plain text."""

    def __init__(self, path: Path) -> None:
        raw = path.read_bytes()
        if reason := next(
            (reason for start, reason in FOREIGN.items() if re.match(start, raw)), ""
        ):
            raise UserError(f"{path}: {reason}")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=raw)
        except RuntimeError as error:
            raise UserError(
                f"{path}: not a SentencePiece model ({str(error).splitlines()[0]})"
            ) from None
        self.path, self.sha256, self.size = (
            path,
            hashlib.sha256(raw).hexdigest(),
            self.model.get_piece_size(),
        )
        self.bos_id, self.eos_id = (
            i if i >= 0 else None for i in (self.model.bos_id(), self.model.eos_id())
        )
        self.words = WordIds(self.model) if _splits_at_words(self.model) else None
        self.splits_at_lines = (
            self.words is not None
        )  # is a text's encoding its lines', with `encode_next` for all but the first?

    def encode(self, text: str) -> list[int]:
        """The ids of plain text, without begin or end."""
        return (
            self.encode_next(" " + text)
            if text and self.words is not None
            else self.model.encode(text)
        )

    def encode_next(self, text: str) -> list[int]:
        """The ids of text that goes on after a line break; only for a vocabulary that splits at lines."""
        return list(chain.from_iterable(map(self.words.__getitem__, WORD.findall(text))))

    def control_id(self, name: str) -> int | None:
        """The id of "bos", "eos" or a control token by its own name, such as "<|eot_id|>"; None where there is none."""
        token = self.model.piece_to_id(name)
        return {"bos": self.bos_id, "eos": self.eos_id}.get(
            name, token if self.model.is_control(token) else None
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; control tokens leave no trace."""
        return self.model.decode([token for token in ids if token < self.size])


WORD = re.compile("\n|[ ▁]+[^ ▁\n]*|[^ ▁\n]+")


class WordIds(dict[str, tuple[int, ...]]):
    """The ids of words, found when first asked for. Forgets everything when full: memory stays bounded on any text."""

    LIMIT, LONGEST = 1 << 16, 48  # words kept, and the longest of them in characters: some 25 MB

    def __init__(self, model: sentencepiece.SentencePieceProcessor) -> None:
        self.model = model

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(
            self.model.encode("\n" + word)[2:]
        )  # behind ▁ and the line break, the word gets no ▁ of its own
        if len(word) <= self.LONGEST:
            if len(self) >= self.LIMIT:
                self.clear()
            self[word] = ids
        return ids


def _splits_at_words(model: sentencepiece.SentencePieceProcessor) -> bool:
    """Is a text's encoding its words' encodings? Asks for text taken as it is, bytes for what has no piece, no piece over a gap."""
    probe, line_break = "A  b\n \tﬁ Ａ½ ", model.encode("\n")
    is_kept = (
        model.normalize(probe) == "▁" + probe.replace(" ", "▁")
        and len(line_break) == 2
        and model.is_byte(line_break[1])
    )
    return is_kept and not any(
        "\n" in piece or "▁" in piece.lstrip("▁") for piece in _pieces(model)
    )


def _pieces(model: sentencepiece.SentencePieceProcessor) -> list[str]:
    return model.id_to_piece(list(range(model.get_piece_size())))


class JsonTokenizer:
    """A Hugging Face `tokenizer.json` (LLaMA 3 and others), read by the `tokenizers` package; the same attributes and methods."""

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
        self.model.no_truncation(), self.model.no_padding()
        self.path, self.sha256 = path, hashlib.sha256(path.read_bytes()).hexdigest()
        self.size = self.model.get_vocab_size(with_added_tokens=True)
        config = path.with_name("tokenizer_config.json")
        claimed = read_json(config) if config.is_file() else {}
        named = (claimed.get(f"{name}_token") or "" for name in ("bos", "eos"))
        self.bos_id, self.eos_id = (
            self.model.token_to_id(token["content"] if isinstance(token, dict) else token)
            for token in named
        )

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def control_id(self, name: str) -> int | None:
        return {"bos": self.bos_id, "eos": self.eos_id}.get(name, self.model.token_to_id(name))

    def decode(self, ids: Iterable[int]) -> str:
        return self.model.decode(list(ids), skip_special_tokens=True)


Tokenizer = SentencePieceTokenizer | JsonTokenizer


class Stream:
    """Text of ids as they come; half a character is held back and never printed.

    "天" may be the three byte pieces <0xE5> <0xA4> <0xA9>: the first two pushes return "", the third "天". Ids are decoded behind
    those of the stretch printed last, which tell whether a ▁ stands at the start of the text or within it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.decode, self.ids, self.known = (
            tokenizer.decode,
            [],
            0,
        )  # known: of the ids, those whose text is printed

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is still missing bytes."""
        self.ids.append(token)
        return "" if self.decode(self.ids).endswith("\ufffd") else self.flush()

    def flush(self) -> str:
        """What is left at the end; bytes that never became a character as U+FFFD."""
        text = self.decode(self.ids)[len(self.decode(self.ids[: self.known])) :]
        if text:
            self.ids = self.ids[self.known :]
        self.known = len(self.ids)
        return text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """A LLaMA-style tokenizer.model learnt from `texts`: BPE, byte fallback, digits apart, no normalisation."""
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
    """`base`'s tokenizer.model with the pieces of `added` that it lacks appended, in their order, with score 0.

    How Chinese-LLaMA-Alpaca made its vocabulary, byte for byte. A tokenizer.model is a protobuf message that begins with its
    pieces, each of them field 1 (tag 0x0a), a length and {1: text, 2: score}; what follows them is left as it is. Score 0 is
    above every learnt piece's, so among the new pieces SentencePiece prefers the leftmost, and any of them to an old one.
    """
    old, more = (_pieces(SentencePieceTokenizer(path).model) for path in (base, added))
    raw, known, end = base.read_bytes(), set(old), 0
    for _ in old:
        length, start = _read_varint(raw, end + 1)
        end = start + length
    new = b""
    for text in (piece.encode() for piece in more if piece not in known):
        piece = (
            b"\x0a" + _varint(len(text)) + text + b"\x15" + bytes(4)
        )  # field 1: the text; field 2: a float, 0.0
        new += b"\x0a" + _varint(len(piece)) + piece
    return raw[:end] + new + raw[end:]


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and the position behind it."""
    behind = next(i for i in range(at, len(message)) if message[i] < 128) + 1
    return sum((byte & 127) << 7 * i for i, byte in enumerate(message[at:behind])), behind


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)
