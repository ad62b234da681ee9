"""What others expect beside a tokenizer.model: special_tokens_map.json and tokenizer.json.

A tokenizer.json holds the same vocabulary in another form. SentencePiece joins the neighbours whose
union has the highest score; the package `tokenizers` joins the pair that stands first in a list:

    score of "▁the" -3, of "he" -5      ->      merges  ▁ the, ▁t he, …      in order of score
                                                        h e

So every way to cut a token into two tokens is a pair, and pairs are in the order of their token's
score. What is written is compared with the tokenizer.model before: every token's own text and some
sentences must have the same ids. It is not written for vocabularies whose tokens share scores, such
as Chinese-LLaMA's: what is joined first then depends on its position, which no list can say.
"""

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minillama.added_tokens import AddedToken, read_settings
from minillama.files import write_json
from minillama.sentencepiece_tokenizer import SentencePieceTokenizer, all_tokens

SPECIAL_TOKENS_MAP = "special_tokens_map.json"
FLAGS = ("lstrip", "normalized", "rstrip", "single_word")
SENTENCES = (
    "Below is an instruction that describes a task.\n\n### Instruction:\n",
    "  two  spaces, a tab\t and 1234567890 digits" + 3 * " " + "three" + 45 * " " + "45",
    "玄德曰：备今日得见天日。 Ünïcödé 🙂 ▁ </s>",
    "def f(x):\n    return [x ** 2 for _ in range(10)]  # 100 %",
)
MERGES_NAME = "tokenizer.json"


def complete_tokenizer(directory: Path) -> list[str]:
    """Write those of the two files that a directory with a tokenizer.model lacks.

    Returns a note for the user if there is no tokenizer.json then.
    """
    path = directory / "tokenizer.model"
    if not path.is_file():
        return []
    tokenizer = SentencePieceTokenizer(path)
    if not (directory / SPECIAL_TOKENS_MAP).exists():
        write_json(directory / SPECIAL_TOKENS_MAP, _special_tokens_map(tokenizer))
    if (directory / MERGES_NAME).exists():
        return []
    problem = _why_not(tokenizer)
    if not problem:
        content = tokenizer_json(tokenizer)
        problem = _difference(content, tokenizer)
    if problem:
        return [f"note: no tokenizer.json beside tokenizer.model: {problem}"]
    write_json(directory / MERGES_NAME, content)
    return []


def _special_tokens_map(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """The named special tokens; BOS, EOS and unknown as the vocabulary has them, if unnamed."""
    tokens = {}
    own_ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "unk_token": tokenizer.model.unk_id(),
    }
    for role, number in own_ids.items():
        if number is not None and number >= 0:
            tokens[role] = AddedToken(tokenizer.name_of(number), normalized=False)
    tokens |= read_settings(tokenizer.path).named
    described = {}
    for role, token in tokens.items():
        flags = {name: getattr(token, name) for name in FLAGS}
        described[role] = {"content": token.content, **flags}
    return described


def _why_not(tokenizer: SentencePieceTokenizer) -> str:
    """Why a tokenizer.json cannot be made, or ""."""
    if find_spec("tokenizers") is None:
        return "pip install 'minillama[tokenizers]' makes it possible"
    if tokenizer.words is None:
        return "the vocabulary is not of LLaMA's kind"
    if not tokenizer.is_legacy:
        return "legacy is false in tokenizer_config.json"
    scores = []
    for number in _joined_tokens(tokenizer):
        is_run = len(set(tokenizer.model.id_to_piece(number))) == 1  # of spaces, in LLaMA's
        if not is_run:
            scores.append(_score(tokenizer, number))
    if len(set(scores)) < len(scores):
        return "tokens share scores, so what is joined first depends on its position"
    return ""


def _score(tokenizer: SentencePieceTokenizer, number: int) -> float:
    return tokenizer.model.get_score(number)


def _joined_tokens(tokenizer: SentencePieceTokenizer) -> list[int]:
    """The ids of the tokens that are made by joining others."""
    model = tokenizer.model
    numbers = []
    for number, text in enumerate(all_tokens(model)):
        is_other = model.is_byte(number) or model.is_control(number) or model.is_unknown(number)
        if len(text) > 1 and not is_other:
            numbers.append(number)
    return numbers


def tokenizer_json(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """The content of a tokenizer.json, in the form that the package `tokenizers` reads."""
    texts = all_tokens(tokenizer.model)
    space_to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    mark_to_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokenizer),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, space_to_mark],
        },
        "pre_tokenizer": None,
        "post_processor": _post_processor(tokenizer),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                mark_to_space,
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": texts[tokenizer.model.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: number for number, text in enumerate(texts)},
            "merges": _merges(tokenizer, texts),
        },
    }


def _merges(tokenizer: SentencePieceTokenizer, texts: list[str]) -> list[str]:
    """All pairs of tokens whose union is a token, "left right", the highest score first.

    Runs of spaces share a score. SentencePiece lets the leftmost one grow to its full length, and
    so does a list with the longest first part first.
    """
    known = set(texts)
    pairs = []
    for number in _joined_tokens(tokenizer):
        text = texts[number]
        score = _score(tokenizer, number)
        for cut in range(1, len(text)):
            left = text[:cut]
            right = text[cut:]
            if left in known and right in known:
                pairs.append((-score, -cut, left, right))
    pairs.sort()
    return [f"{left} {right}" for _, _, left, right in pairs]


def _added_tokens(tokenizer: SentencePieceTokenizer) -> list[dict[str, Any]]:
    """The special tokens of the vocabulary, and those that were added to it, by id."""
    model = tokenizer.model
    tokens = {}
    for number, text in enumerate(all_tokens(model)):
        if model.is_control(number) or model.is_unknown(number):
            tokens[number] = AddedToken(text, special=True, normalized=False)
    tokens |= tokenizer.added
    described = []
    for number in sorted(tokens):
        token = tokens[number]
        flags = {name: getattr(token, name) for name in (*FLAGS, "special")}
        described.append({"id": number, "content": token.content, **flags})
    return described


def _post_processor(tokenizer: SentencePieceTokenizer) -> dict[str, Any] | None:
    """What puts BOS before a text; None if the tokenizer adds none."""
    if not tokenizer.starts_with:
        return None
    number = tokenizer.starts_with[0]
    name = tokenizer.name_of(number)
    template: dict[str, list[Any]] = {}
    for key, letters in {"single": "A", "pair": "AB"}.items():
        template[key] = []
        for type_id, letter in enumerate(letters):
            template[key].append({"SpecialToken": {"id": name, "type_id": type_id}})
            template[key].append({"Sequence": {"id": letter, "type_id": type_id}})
    special = {name: {"id": name, "ids": [number], "tokens": [name]}}
    return {"type": "TemplateProcessing", **template, "special_tokens": special}


def _difference(content: dict[str, Any], tokenizer: SentencePieceTokenizer) -> str:
    """The first text that has other ids by `content` than by the tokenizer.model, or ""."""
    import tokenizers

    other = tokenizers.Tokenizer.from_str(json.dumps(content))
    other.encode_special_tokens = True  # the letters of a special token are text
    texts = [*SENTENCES, *_texts_of_tokens(tokenizer)]
    encoded = other.encode_batch(texts, add_special_tokens=False)
    for text, encoding in zip(texts, encoded, strict=True):
        if encoding.ids != tokenizer.encode(text):
            return f"{text!r} would have other ids"
    return ""


def _texts_of_tokens(tokenizer: SentencePieceTokenizer) -> Iterable[str]:
    texts = all_tokens(tokenizer.model)
    for number in _joined_tokens(tokenizer):
        yield texts[number].replace("▁", " ")
