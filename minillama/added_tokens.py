"""Added tokens, and the files beside a tokenizer that name them, BOS and EOS.

A vocabulary is often changed after it was learnt. The changes are in files beside it:

    tokenizer_config.json      names of BOS, EOS and others, add_bos_token, added_tokens_decoder
    special_tokens_map.json    the same names
    added_tokens.json          words that were added, and their ids
    tokenizer.json             beside a tokenizer.model: "added_tokens"

They are read as transformers 4 does: where tokenizer_config.json has added_tokens_decoder, it
alone counts; else the later files of this list overrule the earlier ones.

An added token is a word that the vocabulary does not split: a text is cut wherever it occurs. A
*special* one, such as padding or <|eot_id|>, is never made from text here: it is added by id.
"""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from minillama.errors import UserError
from minillama.files import parsing, read_json

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ADDITIONAL = "additional_special_tokens"
FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


@dataclass(frozen=True)
class AddedToken:
    """A word that is one token. The flags are those of the package `tokenizers`."""

    content: str
    special: bool = False
    normalized: bool = True
    lstrip: bool = False  # it takes the white space before it
    rstrip: bool = False  # and behind it
    single_word: bool = False  # only between spaces, or at an end of the text


@dataclass(frozen=True)
class TokenizerSettings:
    """What the files beside a tokenizer say."""

    config: dict[str, Any]  # tokenizer_config.json
    named: dict[str, AddedToken]  # by role, such as "bos_token"; the names of those that have one
    additional: tuple[AddedToken, ...]  # special tokens without a role
    added: dict[int, AddedToken]

    def name_of(self, role: str) -> str:
        """The token of a role, or ""."""
        return self.named[role].content if role in self.named else ""

    def name_in_config(self, role: str) -> str:
        """The token of a role in tokenizer_config.json alone, or ""."""
        token = self.config.get(role) or ""
        return token["content"] if isinstance(token, dict) else token

    def special_tokens(self) -> list[AddedToken]:
        """All special tokens that are named, in the order in which transformers gives them ids."""
        by_role = [self.named[role] for role in ROLES if role in self.named]
        return [*by_role, *self.additional]

    def flag(self, key: str, default: bool) -> bool:
        """A key of tokenizer_config.json that is true or false; null counts as false."""
        value = self.config.get(key, default)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise UserError(f"{CONFIG}: {key} = {value!r}: expected true or false")
        return value


NO_SETTINGS = TokenizerSettings({}, {}, (), {})


def read_settings(file: Path) -> TokenizerSettings:
    """What the files beside a tokenizer say. Raises UserError for a value of the wrong type.

    A tokenizer whose file does not have its usual name stands alone.
    """
    if file.name not in ("tokenizer.model", "tokenizer.json"):
        return NO_SETTINGS
    directory = file.parent
    config = _read_optional(directory / CONFIG)
    has_decoder = "added_tokens_decoder" in config
    tokens_map = {} if has_decoder else _read_optional(directory / SPECIAL_TOKENS_MAP)
    named: dict[str, AddedToken] = {}
    additional: tuple[AddedToken, ...] = ()
    for name, content in ((CONFIG, config), (SPECIAL_TOKENS_MAP, tokens_map)):
        with parsing(directory / name):
            named |= {role: _special(role, content[role]) for role in ROLES if content.get(role)}
            tokens = _list_of(ADDITIONAL, content.get(ADDITIONAL))
            additional += tuple(_special(ADDITIONAL, token) for token in tokens)
    settings = TokenizerSettings(config, named, tuple(dict.fromkeys(additional)), {})
    if has_decoder:
        with parsing(directory / CONFIG):
            added = _decoder_tokens(config["added_tokens_decoder"])
    else:
        added = _added_tokens_file(directory / "added_tokens.json", settings)
        if file.name == "tokenizer.model":
            added |= _tokens_of_json(directory / "tokenizer.json")
    return replace(settings, added=added)


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _decoder_tokens(decoder: Any) -> dict[int, AddedToken]:
    """The tokens of added_tokens_decoder: {"32000": {"content": "<|im_end|>", …}}."""
    if not isinstance(decoder, dict):
        raise UserError(f"added_tokens_decoder = {decoder!r}: expected an object of tokens by id")
    added = {}
    for number, token in decoder.items():
        if not number.isdecimal():
            raise UserError(f"added_tokens_decoder: {number!r} is not a token id")
        added[int(number)] = _token_of(f"added_tokens_decoder[{number}]", token)
    return added


def _added_tokens_file(path: Path, settings: TokenizerSettings) -> dict[int, AddedToken]:
    """The tokens of added_tokens.json: {"<|im_end|>": 32000}. Those with a role are special."""
    special = {token.content for token in settings.special_tokens()}
    added = {}
    for content, number in _read_optional(path).items():
        if type(number) is not int or number < 0:
            raise UserError(f"{path}: {content!r}: {number!r} is not a token id")
        is_special = content in special
        added[number] = AddedToken(content, is_special, normalized=not is_special)
    return added


def _tokens_of_json(path: Path) -> dict[int, AddedToken]:
    """The added tokens of a tokenizer.json: [{"id": 32000, "content": "<|im_end|>", …}]."""
    added = {}
    with parsing(path):
        for token in _list_of("added_tokens", _read_optional(path).get("added_tokens")):
            if not isinstance(token, dict) or type(token.get("id")) is not int:
                raise UserError(f"added_tokens: {token!r} has no id")
            added[token["id"]] = _token_of("added_tokens", token)
    return added


def _special(key: str, value: Any) -> AddedToken:
    """The special token of a key: its text, or an object that describes it."""
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    return replace(_token_of(key, value), special=True)


def _token_of(key: str, value: Any) -> AddedToken:
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise UserError(f"{key} = {value!r}: expected a token")
    flags = {name: value[name] for name in FLAGS if name in value}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise UserError(f"{key} = {value!r}: its flags are true or false")
    if not flags.get("special"):
        return AddedToken(value["content"], **flags)
    return AddedToken(value["content"], **{"normalized": False, **flags})


def _list_of(key: str, value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(f"{key} = {value!r}: expected a list of tokens")
    return value


class TextPart(NamedTuple):
    """A part of a text: an added token, or what lies between two of them."""

    text: str
    is_token: bool


class AddedWords:
    """Finds added tokens that are not special in a text: leftmost first, the longest of those."""

    def __init__(self, tokens: list[AddedToken]) -> None:
        self.tokens = {token.content: token for token in tokens if token.content}
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self.pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        keep_lines = [not ("\n" in token.content or _looks_around(token)) for token in tokens]
        self.splits_at_lines = all(keep_lines)  # no token takes or needs what lies around a line

    def split(self, text: str) -> list[TextPart]:
        """The parts of a text, without empty ones.

        White space beside a token is removed where its flags say so. A `single_word` inside
        another word is text, and joins the text before it, else that behind it.
        """
        parts = [part for part in self.pattern.split(text) if part]
        for i, part in enumerate(parts):
            token = self.tokens.get(part)
            if token is None:
                continue
            before = parts[i - 1] if i > 0 else ""
            behind = parts[i + 1] if i + 1 < len(parts) else ""
            if token.rstrip and behind:
                parts[i + 1] = behind.lstrip()
            if token.lstrip and before:
                parts[i - 1] = before.rstrip()
            if token.single_word and before and before[-1] != " ":
                parts[i - 1] += part
                parts[i] = ""
            elif token.single_word and behind and behind[0] != " ":
                parts[i + 1] = part + parts[i + 1]
                parts[i] = ""
        return [TextPart(part, part in self.tokens) for part in parts if part]


def _looks_around(token: AddedToken) -> bool:
    return token.lstrip or token.rstrip or token.single_word


def bos_rule(settings: TokenizerSettings, default: str) -> str:
    """What decides whether a text begins with BOS, for the user. default: where no key says it."""
    return f"add_bos_token of {CONFIG}" if "add_bos_token" in settings.config else default


def fingerprint(content: bytes, changes: dict[str, Any]) -> str:
    """The sha256 of a tokenizer's file, and of what files beside it change of the ids of a text."""
    if changes:
        content += json.dumps(changes, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()
