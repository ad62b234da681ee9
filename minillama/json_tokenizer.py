"""A Hugging Face `tokenizer.json` (LLaMA 3 and others), read by the package `tokenizers`.

Whether a text begins with BOS is decided in one of two places, as in transformers:

    tokenizer_class LlamaTokenizer, none, or    add_bos_token of tokenizer_config.json, and the
    another of OWN_RULES                        BOS that is named there
    any other class                             the post-processor of the tokenizer.json
"""

from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from minillama.added_tokens import (
    CONFIG,
    AddedToken,
    TokenizerSettings,
    bos_rule,
    fingerprint,
    read_settings,
)
from minillama.errors import UserError
from minillama.files import parsing

LLAMA = "LlamaTokenizer"
# Classes for which transformers replaces the post-processor, and their add_bos_token if none is
# given.
OWN_RULES = {
    LLAMA: True,
    "CodeLlamaTokenizer": True,
    "GemmaTokenizer": True,
    "CohereTokenizer": True,
    "GPTNeoXTokenizer": False,
}


class JsonTokenizer:
    """It has the attributes and methods of SentencePieceTokenizer."""

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
        self.model.encode_special_tokens = True  # the letters of a special token are text
        self.model.no_truncation()
        self.model.no_padding()
        self.path = path
        settings = read_settings(path)
        own_size = self.model.get_vocab_size(with_added_tokens=True)
        new_tokens = self._new_tokens(settings)
        self.model.add_tokens([tokenizers.AddedToken(**asdict(token)) for token in new_tokens])
        self.size: int = self.model.get_vocab_size(with_added_tokens=True)
        padding = self._id_of(settings.name_of("pad_token"))
        if padding is not None and padding == self.size - 1 >= own_size:
            self.size -= 1  # nothing here needs padding, and models often have no row for it

        self.tokenizer_class = _tokenizer_class(settings)
        is_llama = self.tokenizer_class == LLAMA
        named_bos = self._id_of(settings.name_of("bos_token"))
        self.bos_id = self._id_of("<s>") if is_llama and named_bos is None else named_bos
        self.eos_id = self._id_of(settings.name_of("eos_token"))
        if is_llama and self.eos_id is None:
            self.eos_id = self._id_of("</s>")
        self.named = {role: token.content for role, token in settings.named.items()}
        if is_llama:
            self.named = {"bos_token": "<s>", "eos_token": "</s>", **self.named}
        with parsing(path.with_name(CONFIG)):
            self.starts_with = self._start_of_texts(settings)
        changes: dict[str, Any] = {token.content: asdict(token) for token in new_tokens}
        bos_in_config = self._id_of(settings.name_in_config("bos_token"))
        if self.starts_with != ([] if bos_in_config is None else [bos_in_config]):
            changes["starts_with"] = self.starts_with
        if self.eos_id != self._id_of(settings.name_in_config("eos_token")):
            changes["eos"] = self.eos_id
        self.sha256 = fingerprint(path.read_bytes(), changes)

    def added_tokens(self) -> list[AddedToken]:
        """The added tokens: what a text is cut at before it is encoded."""
        return [
            AddedToken(
                content=token.content,
                special=token.special,
                normalized=token.normalized,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
            )
            for token in self.model.get_added_tokens_decoder().values()
        ]

    def _new_tokens(self, settings: TokenizerSettings) -> list[AddedToken]:
        """The tokens that files beside the tokenizer.json add to it, or change, by id."""
        known = self.added_tokens()
        tokens = [settings.added[number] for number in sorted(settings.added)]
        new_tokens = [token for token in tokens if token not in known]
        contents = {token.content for token in (*known, *new_tokens)}
        special = settings.special_tokens()
        is_special = {token.content for token in special}
        new_tokens += [token for token in special if token.content not in contents]
        return [
            replace(token, special=token.special or token.content in is_special)
            for token in new_tokens
        ]

    def _start_of_texts(self, settings: TokenizerSettings) -> list[int]:
        """The ids that begin a text: BOS, or none. Sets `bos_id` and `bos_rule` with it.

        Raises UserError for a post-processor that begins a text with more than one token.
        """
        if self.tokenizer_class in OWN_RULES and self.bos_id is not None:
            adds_bos = settings.flag("add_bos_token", OWN_RULES[self.tokenizer_class])
            self.bos_rule = bos_rule(settings, f"the rule of {self.tokenizer_class}")
            return [self.bos_id] if adds_bos else []
        self.bos_rule = "the post-processor of tokenizer.json"
        with_special = self.model.encode("a", add_special_tokens=True)
        num_before = with_special.word_ids.index(0)
        start = with_special.ids[:num_before]
        if len(start) > 1:
            raise UserError(
                f"{self.path}: its post-processor begins a text with {len(start)} tokens; "
                "one, BOS, is supported"
            )
        if self.bos_id is None and start:
            self.bos_id = start[0]
        return start

    def _id_of(self, content: str) -> int | None:
        return self.model.token_to_id(content) if content else None

    def encode(self, text: str, follows_line_break: bool = False) -> list[int]:
        assert not follows_line_break, "this vocabulary does not split at lines"
        return self.model.encode(text, add_special_tokens=False).ids

    def encode_behind_control(self, text: str) -> list[int]:
        """The ids of a text behind a control token: some vocabularies put no ▁ before it there.

        Behind a line break there is none either. A token of the line break and the text would be
        found out, and is refused.
        """
        if not self._joins_behind_control:
            return self.encode(text)
        line_break = self.encode("\n")
        ids = self.encode("\n" + text)
        if ids[: len(line_break)] != line_break:
            raise UserError(
                f"{self.path}: chat templates are not supported for this vocabulary, which has "
                f"tokens of a line break and a text ({text[:20]!r})"
            )
        return ids[len(line_break) :]

    @cached_property
    def _joins_behind_control(self) -> bool:
        """Whether a text has other ids behind a control token than alone."""
        special = [token.content for token in self.added_tokens() if token.special]
        if not special:
            return False
        try:
            self.model.encode_special_tokens = False
            behind = self.model.encode(special[0] + "a", add_special_tokens=False).ids[1:]
        finally:
            self.model.encode_special_tokens = True
        return behind != self.encode("a")

    def control_id(self, name: str) -> int | None:
        named_by_role = {"bos": self.bos_id, "eos": self.eos_id}
        return named_by_role.get(name, self.model.token_to_id(name))

    def name_of(self, token: int) -> str:
        return self.model.id_to_token(token)

    def decode(self, ids: Iterable[int]) -> str:
        return self.model.decode(list(ids), skip_special_tokens=True)


def _tokenizer_class(settings: TokenizerSettings) -> str:
    """The class that opens it in transformers, without the "Fast" at its end."""
    name = settings.config.get("tokenizer_class") or LLAMA
    return str(name).removesuffix("Fast")
