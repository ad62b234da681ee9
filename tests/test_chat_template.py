"""Chat templates in Jinja: the ids of transformers on harmless texts, and safe ones on others.

The oracle is `apply_chat_template(tokenize=True)` of transformers, with the tokenizer's class that
opens the same files.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama.chat import Conversation, Turn
from minillama.data.encode import encode_pieces, open_chat_template, render_for
from minillama.tokenizer import Tokenizer, open_tokenizer
from tests.conversations import sentences

transformers = pytest.importorskip("transformers")

TEMPLATES = (
    "alpaca",
    "chatml",
    "llama-2-chat",
    "llama-3-instruct",
    "llama-3.1-tools",
    "mistral-instruct",
    "smollm2-instruct",
    "vicuna",
    "zephyr",
)
CONTROL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# Texts with white space around them, which some templates trim.
spaced = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", " ", "\n", " \t\n"]),
    sentences,
    st.sampled_from(["", " ", "\n\n", "\u3000"]),
)
turns = st.lists(st.builds(Turn, spaced, spaced), min_size=1, max_size=3).map(tuple)
conversations = st.builds(Conversation, turns, st.just("") | spaced)


def messages_of(conversation: Conversation) -> list[dict[str, str]]:
    messages = []
    if conversation.system:
        messages.append({"role": "system", "content": conversation.system})
    for turn in conversation.turns:
        messages.append({"role": "user", "content": turn.user})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": turn.answer})
    return messages


def opened(conversation: Conversation) -> Conversation:
    """The conversation with its last answer still to be written."""
    *earlier, last = conversation.turns
    return Conversation((*earlier, Turn(last.user, None)), conversation.system)


def not_trained(conversation: Conversation) -> Conversation:
    return Conversation(
        tuple(Turn(turn.user, turn.answer, is_target=False) for turn in conversation.turns),
        conversation.system,
    )


def bare(shared: Path, folder: Path) -> Any:
    """LLaMA's tokenizer.model alone."""
    shutil.copy(shared / "tokenizers/llama/tokenizer.model", folder)
    return transformers.LlamaTokenizer(str(folder / "tokenizer.model"), legacy=True)


def with_config(**config: Any) -> Callable[[Path, Path], Any]:
    """LLaMA's tokenizer.model with a tokenizer_config.json."""

    def write(shared: Path, folder: Path) -> Any:
        shutil.copy(shared / "tokenizers/llama/tokenizer.model", folder)
        content = {"tokenizer_class": "LlamaTokenizer", **config}
        (folder / "tokenizer_config.json").write_text(json.dumps(content))
        return transformers.LlamaTokenizer.from_pretrained(folder)

    return write


def published(name: str) -> Callable[[Path, Path], Any]:
    """A published directory."""

    def copy(shared: Path, folder: Path) -> Any:
        shutil.copytree(shared / name, folder, dirs_exist_ok=True)
        return transformers.LlamaTokenizer.from_pretrained(folder)

    return copy


def bytes_in_json(shared: Path, folder: Path) -> Any:
    """A tokenizer.json on bytes, as that of LLaMA 3, with the control tokens of all templates."""
    import tokenizers

    model = tokenizers.ByteLevelBPETokenizer()
    text = (shared / "text/tinyshakespeare.txt").read_text()[:50000]
    model.train_from_iterator([text], vocab_size=600)
    model.add_special_tokens(["<s>", "</s>", *CONTROL])
    model.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return transformers.AutoTokenizer.from_pretrained(folder)


def fast(legacy: bool) -> Callable[[Path, Path], Any]:
    """LLaMA's vocabulary as a tokenizer.json, as transformers makes it."""

    def convert(shared: Path, folder: Path) -> Any:
        source = shared / "tokenizers/llama"
        tokenizer = transformers.LlamaTokenizerFast.from_pretrained(
            source, legacy=legacy, from_slow=True
        )
        tokenizer.save_pretrained(folder)
        (folder / "tokenizer.model").unlink()
        return transformers.AutoTokenizer.from_pretrained(folder)

    return convert


def added(special: bool) -> dict[str, Any]:
    """A tokenizer_config.json with the control tokens of ChatML."""
    decoder = {}
    for number, content in enumerate(("<unk>", "<s>", "</s>")):
        decoder[str(number)] = {"content": content, "special": True}
    for number, content in enumerate(CONTROL, start=32000):
        decoder[str(number)] = {"content": content, "special": special}
    config: dict[str, Any] = {"added_tokens_decoder": decoder}
    if special:
        config["additional_special_tokens"] = list(CONTROL)
    return config | {"bos_token": "<s>", "eos_token": "</s>"}


TOKENIZERS = {
    "bare": bare,
    "not legacy": with_config(legacy=False),
    "with special tokens": with_config(legacy=True, **added(special=True)),
    "with special tokens, not legacy": with_config(legacy=False, **added(special=True)),
    "with words": with_config(legacy=True, **added(special=False)),
    "with words, not legacy": with_config(legacy=False, **added(special=False)),
    "chinese": published("tokenizers/chinese_llama2"),
    "stories": published("models/stories260K"),
    "bytes": bytes_in_json,
    "fast": fast(legacy=True),
    "fast, not legacy": fast(legacy=False),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_are_those_of_transformers(kind: str, shared: Path, tmp_path: Path) -> None:
    """For every published template: open and whole, of several turns, with and without a system."""
    reference = TOKENIZERS[kind](shared, tmp_path)
    tokenizer = open_tokenizer(tmp_path)

    for name in TEMPLATES:
        template = (shared / f"templates/{name}.jinja").read_text()
        check_ids(tokenizer, reference, template)


def check_ids(tokenizer: Tokenizer, reference: Any, template: str) -> None:
    def expected(conversation: Conversation) -> list[int]:
        return reference.apply_chat_template(
            messages_of(conversation),
            chat_template=template,
            tokenize=True,
            add_generation_prompt=conversation.turns[-1].answer is None,
        )

    @given(conversation=conversations)
    @settings(max_examples=12, deadline=None)
    def are_equal(conversation: Conversation) -> None:
        for which in (opened(conversation), not_trained(conversation)):
            before = expected(which)
            ids, mask = encode_pieces(tokenizer, render_for(tokenizer, template, which))
            after = expected(which)
            assert ids in (before, after)  # they differ at midnight, where a date is written
            assert not any(mask)

    are_equal()


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_trained_on_in_every_published_template(
    name: str, shared: Path, tmp_path: Path
) -> None:
    """The files of one publisher are meant to be used without their line breaks and indents."""
    TOKENIZERS["with special tokens"](shared, tmp_path)
    tokenizer = open_tokenizer(tmp_path)
    template = (shared / f"templates/{name}.jinja").read_text()
    if not name.startswith(("smollm2", "llama-3.1")):
        template = template.replace("    ", "").replace("\n", "")
    conversation = Conversation((Turn("Hi", "Hello"), Turn("Who are you?", "A llama.")), "Be nice.")
    pieces = render_for(tokenizer, template, conversation)
    trained = [piece.text.strip() or piece.control for piece in pieces if piece.is_target]
    end = {"chatml": "<|im_end|>", "smollm2-instruct": "<|im_end|>"}.get(name, "eos")
    end = "<|eot_id|>" if name.startswith("llama-3") else end
    assert trained == ["Hello", end, "A llama.", end]
    ids, mask = encode_pieces(tokenizer, pieces)
    prompt, _ = encode_pieces(tokenizer, render_for(tokenizer, template, opened(conversation)))
    assert ids[: len(prompt)] == prompt
    assert all(mask[len(prompt) : len(prompt) + 3])
    assert open_chat_template(tokenizer, template).prompt_warning() == ""
