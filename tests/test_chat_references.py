"""Templates against the reference systems, whose algorithms are written down again here.

Each reference takes transformers' slow tokenizer and a conversation, and returns ids and mask.
"""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama import chat
from minillama.chat import Conversation, Turn
from tests.conversations import encode, text_of, turns


def fastchat(slow, conversation):
    """FastChat: tokenize the whole text, then count out the masks from its parts."""
    text = (conversation.system or chat.VICUNA_SYSTEM) + " "
    for turn in conversation.turns:
        text += f"USER: {turn.user} ASSISTANT: {turn.answer}</s>"
    ids = slow(text).input_ids
    mask = [1] * len(ids)
    mask[0] = 0
    cursor = 1
    for part in text.split("</s>"):
        if part == "":
            break
        instruction = part.split(" ASSISTANT: ")[0] + " ASSISTANT: "
        num_masked = len(slow(instruction).input_ids) - 2
        mask[cursor : cursor + num_masked] = [0] * num_masked
        cursor += len(slow(part).input_ids)
    assert cursor == len(ids)
    return ids, mask


def stanford(slow, conversation):
    """Stanford Alpaca: the joint text, with the prompt masked by its own count."""
    (turn,) = conversation.turns
    open_prompt = text_of("alpaca", Conversation((Turn(turn.user, None),)))
    prompt = open_prompt.removeprefix("<s>")
    ids = slow(prompt + turn.answer + "</s>").input_ids
    num_prompt = len(slow(prompt).input_ids)
    return ids, [0] * num_prompt + [1] * (len(ids) - num_prompt)


def encode_apart(slow, prompt, answer):
    """Prompt and answer tokenized apart, the answer without BOS."""
    source = slow(prompt).input_ids
    target = slow(answer + "</s>", add_special_tokens=False).input_ids
    return source + target, [0] * len(source) + [1] * len(target)


def chinese_alpaca(slow, conversation):
    (turn,) = conversation.turns
    prompt = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{turn.user}\n\n### Response: "
    )
    return encode_apart(slow, prompt, turn.answer)


def chinese_alpaca_2(slow, conversation):
    (turn,) = conversation.turns
    system = "You are a helpful assistant. 你是一个乐于助人的助手。"
    prompt = f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{turn.user} [/INST]"
    return encode_apart(slow, prompt, turn.answer)


def ascend(slow, conversation):
    """AscendSpeed with --append-eod: the whole text, masked up to the last response."""
    text = "\n" + chat.ASCEND_SYSTEM + "\n"
    input_line = "\n" if len(conversation.turns) == 1 else ""
    for turn in conversation.turns:
        text += f"### Instruction:\n{turn.user}{input_line}\n### Response:\n{turn.answer}\n"
    ids = [*slow(text).input_ids, 2]
    prompt = text.rsplit("### Response:", 1)[0] + "### Response:\n"
    num_prompt = len(slow(prompt).input_ids)
    return ids, [0] * num_prompt + [1] * (len(ids) - num_prompt)


def llama_factory(slow, conversation):
    """LLaMA-Factory's default: every slot is encoded by itself."""
    ids = []
    mask = []
    for number, turn in enumerate(conversation.turns):
        slots = [
            ("\n" if number else "", 0),
            (f"Human: {turn.user}\nAssistant: ", 0),
            (turn.answer + "</s>", 1),
        ]
        for text, is_target in slots:
            slot_ids = slow(text, add_special_tokens=False).input_ids if text else []
            ids += slot_ids
            mask += [is_target] * len(slot_ids)
    return ids, mask


@pytest.mark.parametrize(
    ("template", "reference", "most_turns"),
    [
        ("vicuna_v1.1", fastchat, 3),
        ("alpaca", stanford, 1),
        ("chinese_alpaca", chinese_alpaca, 1),
        ("chinese_alpaca_2", chinese_alpaca_2, 1),
        ("ascend_instruction", ascend, 3),
        ("llama_factory_default", llama_factory, 3),
    ],
)
def test_ids_and_trained_positions_are_those_of_the_reference_algorithm(
    llama_tokenizer, template, reference, most_turns
):
    transformers = pytest.importorskip("transformers")
    slow = transformers.LlamaTokenizer(str(llama_tokenizer.path), legacy=True)
    # AscendSpeed searches the text for its marks, so an answer must not hold one.
    mark = re.compile("###") if template == "ascend_instruction" else re.compile("(?!)")
    allowed = turns.filter(lambda turn: not mark.search(turn.answer))

    @given(st.lists(allowed, min_size=1, max_size=most_turns).map(tuple))
    @settings(max_examples=40, deadline=None)
    def are_equal(turns_of_conversation):
        conversation = Conversation(turns_of_conversation)
        assert encode(llama_tokenizer, template, conversation) == reference(slow, conversation)

    are_equal()
