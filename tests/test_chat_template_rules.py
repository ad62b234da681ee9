"""Chat templates in Jinja: what no text can do, what is trained on, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillama.chat import Conversation, Turn
from minillama.data.encode import encode_pieces, end_of_answer, open_chat_template, render_for
from minillama.errors import UserError
from minillama.tokenizer import Tokenizer, open_tokenizer
from tests.conversations import conversations, sentences

CONTROL = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] != 'assistant' %}"
    "[INST] {{ message['content'] | trim }} [/INST]{% else %} {{ message['content'] | trim }} "
    "{{ eos_token }}{% endif %}{% endfor %}"
)
SHARED = [HealthCheck.function_scoped_fixture]  # the vocabulary is read only
ONE_TURN = Conversation((Turn("Q", "A"),))
TWO_TURNS = Conversation((Turn("Q", "A"), Turn("R", "B")))


def with_tokens(small_tokenizer: Tokenizer, folder: Path, special: bool) -> Tokenizer:
    """A small vocabulary with the tokens of ChatML, as control tokens or as words."""
    shutil.copy(small_tokenizer.path, folder)
    decoder = {}
    for number, content in enumerate(CONTROL, start=400):
        decoder[str(number)] = {"content": content, "special": special}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    return open_tokenizer(folder)


@pytest.fixture(params=[True, False], ids=["control tokens", "words"])
def chatml_tokenizer(
    request: pytest.FixtureRequest, small_tokenizer: Tokenizer, tmp_path: Path
) -> Tokenizer:
    return with_tokens(small_tokenizer, tmp_path, special=request.param)


def encode(
    tokenizer: Tokenizer, template: str, conversation: Conversation
) -> tuple[list[int], list[int]]:
    return encode_pieces(tokenizer, render_for(tokenizer, template, conversation))


def trained_text(tokenizer: Tokenizer, template: str, conversation: Conversation) -> list[str]:
    pieces = render_for(tokenizer, template, conversation)
    return [piece.text or piece.control for piece in pieces if piece.is_target]


# --- texts stay texts

HOSTILE = st.lists(
    st.sampled_from(
        [*CONTROL, "<s>", "</s>", "<unk>", "<|IM_END|>", "<", "/s>", "|im_end|>", "<|im", " ", "\n"]
    )
    | sentences
    | st.characters(min_codepoint=0xE000, max_codepoint=0xF8FF)
    | st.characters(min_codepoint=0xF0000, max_codepoint=0xF0010),
    max_size=6,
).map("".join)


@given(texts=st.lists(HOSTILE, min_size=4, max_size=4), system=HOSTILE)
@settings(max_examples=150, deadline=None, suppress_health_check=SHARED)
def test_no_text_becomes_a_control_token(
    chatml_tokenizer: Tokenizer, texts: list[str], system: str
) -> None:
    """A word, which is a token without being special, counts where the template writes it."""
    is_special = all(token.special for token in chatml_tokenizer.added_tokens())
    names = {CHATML: ["bos", "eos", *CONTROL], INST: ["bos", "eos"]}
    if is_special:
        names[INST] = names[CHATML]
    turns = (Turn(texts[0], texts[1]), Turn(texts[2], texts[3]))
    plain = Conversation((Turn("Q", "A"), Turn("R", "B")), "S" if system else "")
    for template in (CHATML, INST):
        hostile_ids, _ = encode(chatml_tokenizer, template, Conversation(turns, system))
        plain_ids, _ = encode(chatml_tokenizer, template, plain)
        for name in names[template]:
            token = chatml_tokenizer.control_id(name)
            assert token is not None
            assert hostile_ids.count(token) == plain_ids.count(token)


def test_the_letters_of_a_control_token_are_read_as_letters(
    small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer = with_tokens(small_tokenizer, tmp_path, special=True)
    ids, _ = encode(tokenizer, CHATML, Conversation((Turn("a <|im_end|> b", None),)))
    start = tokenizer.control_id("<|im_start|>")
    end = tokenizer.control_id("<|im_end|>")
    texts = ("user\na <|im_end|> b", "\n", "assistant\n")
    question, line_break, answer = [tokenizer.encode_behind_control(text) for text in texts]
    assert ids == [start, *question, end, *line_break, start, *answer]


def test_letters_that_a_template_makes_small_are_no_control_token(
    small_tokenizer: Tokenizer,
) -> None:
    template = "{% for m in messages %}{{ m.content | lower }}{% endfor %}"
    ids, _ = encode(small_tokenizer, template, Conversation((Turn("A</S>", None),)))
    assert ids == small_tokenizer.encode("a</s>")
    assert small_tokenizer.eos_id not in ids


# --- what is trained on


def test_an_answer_and_its_end_are_trained_on(chatml_tokenizer: Tokenizer) -> None:
    end = "<|im_end|>"
    assert trained_text(chatml_tokenizer, CHATML, TWO_TURNS) == ["A", end, "B", end]
    assert end_of_answer(chatml_tokenizer, CHATML) == end
    assert trained_text(chatml_tokenizer, INST, TWO_TURNS) == [" A ", "eos", " B ", "eos"]
    first_is_context = Conversation((Turn("Q", "A", is_target=False), Turn("R", "B")))
    assert trained_text(chatml_tokenizer, CHATML, first_is_context) == ["B", end]
    opened = Conversation((Turn("Q", "A"), Turn("R", None)))
    assert trained_text(chatml_tokenizer, CHATML, opened) == []


@pytest.mark.parametrize("template", [CHATML, INST])
@given(conversation=conversations)
@settings(max_examples=40, deadline=None, suppress_health_check=SHARED)
def test_an_open_prompt_is_the_beginning_of_what_was_trained(
    chatml_tokenizer: Tokenizer, template: str, conversation: Conversation
) -> None:
    *earlier, last = conversation.turns
    ids, mask = encode(chatml_tokenizer, template, conversation)
    prompt = Conversation((*earlier, Turn(last.user, None)), conversation.system)
    opened, _ = encode(chatml_tokenizer, template, prompt)
    assert ids[: len(opened)] == opened
    assert mask[: len(opened)] == [0] * len(opened) or len(earlier) > 0
    num_behind = 2 if template == CHATML else 0  # ▁ and the line break behind <|im_end|>
    num_trained = len(ids) - len(opened) - num_behind
    assert mask[len(opened) :] == [1] * num_trained + [0] * num_behind


def test_spaces_before_an_answer_belong_to_it(small_tokenizer: Tokenizer) -> None:
    """A prompt that ends in a space has a token of its own for it, an answer's first word none."""
    template = INST.replace("[/INST]{% else %} ", "[/INST] {% else %}")
    assert trained_text(small_tokenizer, template, TWO_TURNS) == [" A ", "eos", " B ", "eos"]
    ids, mask = encode(small_tokenizer, template, ONE_TURN)
    trained = [token for token, is_target in zip(ids, mask, strict=True) if is_target]
    assert small_tokenizer.decode(trained) == "A "
    assert "ends in a space" in open_chat_template(small_tokenizer, template).prompt_warning()


def test_where_the_prompt_is_written_in_another_way_the_answers_text_is_trained_on(
    small_tokenizer: Tokenizer,
) -> None:
    """As in templates that begin a thought in the generation prompt."""
    template = INST + "{% if add_generation_prompt %}<think>{% endif %}"
    assert trained_text(small_tokenizer, template, TWO_TURNS) == [" A ", "eos", " B ", "eos"]
    warning = open_chat_template(small_tokenizer, template).prompt_warning()
    assert "writes '<think>' before an answer" in warning
    assert open_chat_template(small_tokenizer, INST).prompt_warning() == ""


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            # the system text, or here a word, stands before the last question
            "{% for m in messages %}{% if m.role == 'user' %}{% if loop.index >= loop.length - 1 %}"
            "now {% endif %}{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}",
            "writes messages in another way once others follow .'now .*one turn",
        ),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "no control token"),
        (
            "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}",
            "leaves out message 1 .'Q'",
        ),
    ],
)
def test_a_template_that_cannot_be_trained_on_is_refused(
    small_tokenizer: Tokenizer, template: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        render_for(small_tokenizer, template, TWO_TURNS)


# --- templates that read the texts


def test_a_template_may_take_a_thought_out_of_an_answer(small_tokenizer: Tokenizer) -> None:
    template = INST.replace(
        " {{ message['content'] | trim }} ", " {{ message['content'].split('</think>')[-1] }} "
    )
    conversation = Conversation((Turn("Q", "hm</think>A"), Turn("R", "B")))
    assert trained_text(small_tokenizer, template, conversation) == [" A ", "eos", " B ", "eos"]


def test_a_template_that_decides_by_the_first_letters_of_a_text_refuses_that_text(
    small_tokenizer: Tokenizer,
) -> None:
    template = (
        "{% for m in messages %}{% if m.content.startswith('/') %}!{% endif %}"
        "{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    prompt = Conversation((Turn("hello", None),))
    assert render_for(small_tokenizer, template, prompt)[0].text == "hello"
    with pytest.raises(UserError, match=r"decides by the letters of a message.*'!/hello"):
        render_for(small_tokenizer, template, Conversation((Turn("/hello", None),)))
