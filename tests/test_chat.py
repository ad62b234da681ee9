"""Templates: golden vectors of the reference systems, and laws that every template keeps.

test_chat_references.py compares them with the algorithms of those systems.
"""

from dataclasses import replace

import pytest
from hypothesis import given, settings

from minillama import chat
from minillama.chat import TEMPLATES, Conversation, Turn, render
from minillama.data.encode import encode_pieces
from minillama.errors import UserError
from tests.conversations import conversations, encode, text_of

SENTENCEPIECE = [name for name in TEMPLATES if name not in ("llama3", "chatml")]
ENDS = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>"}  # of an answer; others end it with EOS

# --- golden vectors, made with the reference systems


def test_vicuna_golden_vector(llama_tokenizer):
    """FastChat's ids for two rounds, and its mask: only the answers and their EOS are targets."""
    conversation = Conversation((Turn("Who are you?", "I am Vicuna."), Turn("Bye", "Bye!")))
    ids, mask = encode(llama_tokenizer, "vicuna_v1.1", conversation)
    # fmt: off
    assert ids == [
        1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450,
        20255, 4076, 8444, 29892, 13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915,
        29879, 5155, 29889, 3148, 1001, 29901, 11644, 526, 366, 29973, 319, 1799, 9047, 13566,
        29901, 306, 626, 13423, 4347, 29889, 2, 3148, 1001, 29901, 2648, 29872, 319, 1799,
        9047, 13566, 29901, 2648, 29872, 29991, 2,
    ]
    # fmt: on
    assert [i for i, trained in enumerate(mask) if trained] == [*range(43, 49), *range(59, 63)]


def test_llama_factory_default_golden_vector(llama_tokenizer):
    conversation = Conversation((Turn("hi", "hello"), Turn("hi", "hello")))
    ids, mask = encode(llama_tokenizer, "llama_factory_default", conversation)
    source = [12968, 29901, 7251, 13, 7900, 22137, 29901, 29871]
    target = [22172, 2]
    line_break = [29871, 13]  # ▁ and the byte
    assert ids == source + target + line_break + source + target  # no BOS
    assert mask == [0] * 8 + [1] * 2 + [0] * 10 + [1] * 2


def test_ascend_instruction_golden_lengths(llama_tokenizer):
    pieces = render("ascend_instruction", Conversation((Turn("Say hi", "Hi there"),)))
    ids, mask = encode_pieces(
        llama_tokenizer, pieces[:-1]
    )  # the golden sample was made without --append-eod
    assert len(ids) == 71 and mask == [0] * 68 + [1] * 3
    assert ids[-1] == 13 and mask[-1]  # the line break after the answer is trained on
    text = text_of("ascend_instruction", Conversation((Turn("Say hi", "Hi there"),)))
    assert text.startswith("<s>\nBelow is an instruction") and text.endswith(
        "step by step.\n### Instruction:\nSay hi\n\n### Response:\nHi there\n</s>"
    )


def test_renderings_are_those_of_the_reference_systems():
    one, two = Conversation((Turn("Q", "A"),)), Conversation((Turn("Q", "A"), Turn("R", "B")), "S")
    with_input = Conversation((Turn("Q", "A", "I"),))
    task = "Below is an instruction that describes a task"
    request = "Write a response that appropriately completes the request."
    assert (
        text_of("alpaca", one)
        == f"<s>{task}. {request}\n\n### Instruction:\nQ\n\n### Response:A</s>"
    )
    assert text_of("alpaca", with_input) == (
        f"<s>{task}, paired with an input that provides further context. {request}\n\n"
        "### Instruction:\nQ\n\n### Input:\nI\n\n### Response:A</s>"
    )
    assert text_of("vicuna_v1.1", two) == "<s>S USER: Q ASSISTANT: A</s>USER: R ASSISTANT: B</s>"
    assert text_of("llama2", one) == "<s>[INST] Q [/INST] A </s>"
    assert (
        text_of("llama2", two)
        == "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A </s><s>[INST] R [/INST] B </s>"
    )
    assert (
        text_of("chinese_alpaca", with_input)
        == f"<s>{task}. {request}\n\n### Instruction:\nQ\nI\n\n### Response: A</s>"
    )
    assert text_of("chinese_alpaca_2", with_input) == (
        "<s>[INST] <<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\n"
        "Q\nI [/INST]A</s>"
    )
    assert text_of("chinese_alpaca_2", two).endswith("Q [/INST]A</s><s>[INST] R [/INST]B</s>")
    assert text_of("ascend_instruction", two) == (
        "<s>\nS\n### Instruction:\nQ\n### Response:\nA\n### Instruction:\nR\n### Response:\nB\n</s>"
    )
    assert text_of("llama_factory_default", with_input) == "Human: Q\nI\nAssistant: A</s>"
    assert text_of("raw", with_input) == "<s>Q\nIA</s>"
    assert text_of("raw", two) == "<s>SQA</s>RB</s>"
    assert text_of("zephyr", two) == (
        "<|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\nA</s>\n"
        "<|user|>\nR</s>\n<|assistant|>\nB</s>"
    )
    assert text_of("chatml", Conversation((Turn("Q", "A"), Turn("R", None)), "S")) == (
        "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nR<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert text_of("llama3", Conversation((Turn("Q", None),), "S")) == (
        f"<s>{head.format('system')}S<|eot_id|>{head.format('user')}Q<|eot_id|>{head.format('assistant')}"
    )


def test_metas_templates_strip_texts():
    spaced = Conversation((Turn(" Q ", " A "),))
    assert text_of("llama2", spaced) == "<s>[INST] Q [/INST] A </s>"
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert text_of("llama3", spaced) == (
        f"<s>{head.format('user')}Q<|eot_id|>{head.format('assistant')}A<|eot_id|>"
    )


# --- the reference algorithms, on rendered text


# --- laws


@pytest.mark.parametrize("template", SENTENCEPIECE)
@given(conversation=conversations)
@settings(max_examples=40, deadline=None)
def test_an_open_prompt_is_the_beginning_of_what_was_trained(
    small_tokenizer, template, conversation
):
    if template in (
        "raw",
        "alpaca",
    ):  # nothing stands between prompt and answer: the law holds where the two cannot merge
        conversation = replace(
            conversation,
            turns=tuple(Turn(t.user + "\n", "A" + t.answer) for t in conversation.turns),
        )
    *earlier, last = conversation.turns
    ids, mask = encode(small_tokenizer, template, conversation)
    opened, nothing = encode(
        small_tokenizer,
        template,
        Conversation((*earlier, Turn(last.user, None)), conversation.system),
    )
    assert ids[: len(opened)] == opened
    assert mask[: len(opened)] == nothing and all(mask[len(opened) :])


@pytest.mark.parametrize("template", ENDS)
def test_an_open_prompt_with_tokens_of_its_own_is_the_beginning_of_what_was_trained(template):
    turn = Turn("Q", "A")
    opened, answered = (
        render(template, Conversation((turn, last))) for last in (Turn("R", None), Turn("R", "B"))
    )
    assert answered[: len(opened)] == opened
    end = ENDS[template]
    targets = [piece.text or piece.control for piece in answered if piece.is_target]
    assert targets == ["A", end, "B", end]


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_trained_answer_ends_in_one_trained_eos(template):
    pieces = render(template, Conversation((Turn("Q", "A"), Turn("R", "B"))))
    answers = [i for i, piece in enumerate(pieces) if piece.is_target and piece.text]
    assert len(answers) == (1 if template == "ascend_instruction" else 2)
    for i in answers:
        assert pieces[i + 1].is_target
        assert pieces[i + 1].control == ENDS.get(template, "eos")
    assert sum(piece.is_target for piece in pieces) == 2 * len(answers)


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answer_that_is_only_read_is_not_trained_on(template):
    pieces = render(
        template, Conversation((Turn("Q", "A", None, is_target=False), Turn("R", "B", None)))
    )
    assert [piece.text.strip() for piece in pieces if piece.is_target and piece.text] == ["B"]


@pytest.mark.parametrize("template", SENTENCEPIECE)
def test_text_never_becomes_a_control_token(small_tokenizer, template):
    letters = "<s></s><unk>[INST] </s>USER: "
    plain, attack = (Conversation((Turn(text, text),), text) for text in ("x", letters))
    counts = [
        [encode(small_tokenizer, template, c)[0].count(token) for token in (0, 1, 2)]
        for c in (plain, attack)
    ]
    assert counts[0] == counts[1]


def test_a_glued_piece_begins_where_the_counting_rule_says(small_tokenizer):
    class Merging:  # a vocabulary in which "ab" is one token, and "xyzw"
        control_id = small_tokenizer.control_id

        def encode(self, text):
            return [ord(c) for c in text.replace("ab", "Z").replace("xyzw", "W")]

    glued = [chat.Piece("xa"), chat.Piece("bc", is_target=True, glued=True)]
    assert encode_pieces(Merging(), glued) == (
        [ord(c) for c in "xZc"],
        [0, 0, 1],
    )  # "xa" alone counts two
    shorter = [chat.Piece("xyz"), chat.Piece("w", is_target=True, glued=True)]
    assert encode_pieces(Merging(), shorter) == ([ord("W")], [0])
    fresh = [chat.Piece("xa"), chat.Piece("bc", is_target=True)]
    assert encode_pieces(Merging(), fresh) == ([ord(c) for c in "xabc"], [0, 0, 1, 1])


def test_an_unknown_template_names_the_closest(small_tokenizer):
    with pytest.raises(UserError, match=r"did you mean 'vicuna_v1\.1'"):
        render("vicuna_v11", Conversation((Turn("Hi", None),)))
    with pytest.raises(UserError, match=r"has no <\|start_header_id\|> token"):
        encode(small_tokenizer, "llama3", Conversation((Turn("Q", "A"),)))
