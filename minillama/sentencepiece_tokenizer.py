"""A LLaMA `tokenizer.model`, read by the package `sentencepiece`.

The vocabulary of a SentencePiece LLaMA model is <unk> <s> </s>, then 256 byte tokens for characters
that no other token covers, then the learnt tokens, in which "▁" stands for a space. Encoding puts a
▁ before the text, and decoding removes it.

Encoding is fast, because no token of such a vocabulary crosses the beginning of a word: ▁ only
stands at the front of a token, and a line break in no token. So the ids of a text are the ids of
its words, one after another, and a word that was seen before is looked up.

    "the cat\\nsat"  =  ▁the | ▁cat | \\n | sat
"""

import re
from collections.abc import Iterable
from dataclasses import astuple
from itertools import chain
from pathlib import Path
from typing import Any

import sentencepiece

from minillama.added_tokens import (
    CONFIG,
    AddedToken,
    AddedWords,
    TokenizerSettings,
    bos_rule,
    fingerprint,
    read_settings,
)
from minillama.errors import UserError
from minillama.files import parsing

# How files begin that are often found in the place of a SentencePiece model, and what to do.
WRONG_FILES = {
    rb"\Z": "the file is empty; download it again",
    rb"version https://git-lfs": "a git-lfs pointer, not the file; run `git lfs pull`",
    rb"\s*[<{]": "a web page or JSON, not a SentencePiece model; download the file itself",
    rb"[A-Za-z0-9+/]+=* 0\n": "Meta's tiktoken format (LLaMA 3); use the tokenizer.json instead",
}


class SentencePieceTokenizer:
    """A LLaMA `tokenizer.model`. Equal to transformers' slow LlamaTokenizer on plain text.

    bos_id, eos_id: the named tokens, else the model file's. named: the letters of the token of each
    role, such as "eos_token". starts_with: the ids that begin a text.
    size: above every id, except that of a padding token, which nothing here needs.
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
        self.num_pieces: int = self.model.get_piece_size()
        self.words = WordIds(self.model) if _splits_at_words(self.model) else None

        settings = read_settings(path)
        with parsing(path.with_name(CONFIG)):
            adds_bos = settings.flag("add_bos_token", default=True)
            has_legacy_key = settings.config.get("legacy") is not None
            self.is_legacy = settings.flag("legacy", default=True) if has_legacy_key else True
        self.added = self._with_named_tokens(settings)
        self._added_ids = {token.content: number for number, token in self.added.items()}
        words = [token for token in self.added.values() if not token.special]
        self.added_words = AddedWords(words) if words else None
        if words and self.words is None and not self.is_legacy:
            raise UserError(
                f"{path}: added tokens with legacy = false are not supported for this vocabulary; "
                f"set legacy to true in {CONFIG}"
            )
        self._refuse_second_ids(words)
        padding = self._added_ids.get(settings.name_of("pad_token"))
        self.size = max([self.num_pieces, *(n + 1 for n in self.added if n != padding)])
        self.bos_id = self._id_of_role(settings, "bos_token", self.model.bos_id())
        self.eos_id = self._id_of_role(settings, "eos_token", self.model.eos_id())
        self.named = {role: token.content for role, token in settings.named.items()}
        for role, token in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            if token is not None:
                self.named.setdefault(role, self.name_of(token))
        self.starts_with = [self.bos_id] if adds_bos and self.bos_id is not None else []
        self.bos_rule = bos_rule(settings, "the rule of a tokenizer.model")
        keeps_lines = self.added_words is None or self.added_words.splits_at_lines
        self.splits_at_lines = self.words is not None and keeps_lines
        self.sha256 = self._fingerprint(content, padding)

    def _with_named_tokens(self, settings: TokenizerSettings) -> dict[int, AddedToken]:
        """All added tokens. A special token that has a name but no id gets the next free one."""
        added = dict(settings.added)
        known = {*all_tokens(self.model), *(token.content for token in added.values())}
        for token in settings.special_tokens():
            if token.content not in known:
                added[len(known)] = token
                known.add(token.content)
        return added

    def _refuse_second_ids(self, words: list[AddedToken]) -> None:
        for token in words:
            own_id = self.model.piece_to_id(token.content)
            is_piece = self.model.id_to_piece(own_id) == token.content
            if is_piece and own_id != self._added_ids[token.content]:
                raise UserError(
                    f"{self.path}: the added token {token.content!r} has the id "
                    f"{self._added_ids[token.content]}, but the vocabulary has it as {own_id}; "
                    "remove it from the files beside the vocabulary"
                )

    def _id_of_role(self, settings: TokenizerSettings, role: str, own: int) -> int | None:
        name = settings.name_of(role)
        if name:
            return self._added_ids.get(name, self.model.piece_to_id(name))
        return own if own >= 0 else None  # -1: the model has none

    def _fingerprint(self, content: bytes, padding: int | None) -> str:
        """The sha256 of the file, and of what the files beside it change of the ids of a text."""
        changes: dict[str, Any] = {}
        for number, token in self.added.items():
            is_own = token.special and number < self.num_pieces
            if number != padding and not is_own:
                changes[str(number)] = [*astuple(token), self.is_legacy]
        own_bos = self.model.bos_id()
        if self.starts_with != ([own_bos] if own_bos >= 0 else []):
            changes["starts_with"] = self.starts_with
        if self.eos_id not in (self.model.eos_id(), None):
            changes["eos"] = self.eos_id
        return fingerprint(content, changes)

    def encode(self, text: str, follows_line_break: bool = False) -> list[int]:
        """The ids of plain text, without BOS and EOS.

        follows_line_break: the text continues another one, so no ▁ is put before it.
        """
        if self.added_words is None:
            return self._encode_words(text, not follows_line_break)
        return self._encode_with_added(self.added_words, text, follows_line_break)

    def encode_behind_control(self, text: str) -> list[int]:
        """The ids of a text behind a control token: it has a ▁ of its own, or none (not legacy)."""
        if self.words is None and not self.is_legacy:
            raise UserError(
                f"{self.path}: chat templates with legacy = false are not supported for this "
                f"vocabulary; set legacy to true in {CONFIG}"
            )
        return self.encode(text, follows_line_break=not self.is_legacy)

    def _encode_with_added(
        self, added_words: AddedWords, text: str, follows_line_break: bool
    ) -> list[int]:
        """The ids of a text that is cut at added tokens.

        As in transformers, each part has a ▁ of its own (legacy), or only the beginning.
        """
        begins_with_space = not follows_line_break
        if not self.is_legacy:
            text = text.replace("▁", " ")
            if text and begins_with_space:
                text = "▁" + text
            begins_with_space = False
        ids: list[int] = []
        for number, part in enumerate(added_words.split(text)):
            if part.is_token:
                ids.append(self._added_ids[part.text])
                continue
            is_later = number > 0 and self.is_legacy
            ids += self._encode_words(part.text, begins_with_space or is_later)
        return ids

    def _encode_words(self, text: str, begins_with_space: bool) -> list[int]:
        if self.words is None or text == "":
            return self.model.encode(text)
        return self.words.encode(" " + text if begins_with_space else text)

    def control_id(self, name: str) -> int | None:
        """The id of "bos", "eos", or of a special token such as "<|eot_id|>"; None if missing."""
        named_by_role = {"bos": self.bos_id, "eos": self.eos_id}
        token = self._added_ids.get(name)
        if token is None and self.model.is_control(self.model.piece_to_id(name)):
            token = self.model.piece_to_id(name)
        return named_by_role.get(name, token)

    def added_tokens(self) -> list[AddedToken]:
        """The added tokens, and BOS and EOS: what a text is cut at before it is encoded."""
        names = [self.named[role] for role in ("bos_token", "eos_token") if role in self.named]
        own = [AddedToken(name, special=True) for name in names if name not in self._added_ids]
        return [*self.added.values(), *own]

    def name_of(self, token: int) -> str:
        """What a token is called, such as "<s>"."""
        return self.added[token].content if token in self.added else self.model.id_to_piece(token)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Special tokens, and ids without a token, are left out.

        As in transformers, a space stands before and behind an added token.
        """
        parts: list[str] = []
        run: list[int] = []  # ids between two added tokens
        for number in ids:
            token = self.added.get(number)
            if token is None and number < self.num_pieces:
                run.append(number)
            if token is None or token.special:
                continue
            parts += [self.model.decode(run), token.content]
            run = []
        if not parts:
            return self.model.decode(run)
        if any(not self.model.is_control(number) for number in run):
            return " ".join([*filter(None, parts), self.model.decode(run)])
        return " ".join(filter(None, parts))


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
    return not any("\n" in token or "▁" in token.lstrip("▁") for token in all_tokens(model))


def all_tokens(model: sentencepiece.SentencePieceProcessor) -> list[str]:
    """The texts of all tokens, in order of id."""
    return model.id_to_piece(list(range(model.get_piece_size())))
