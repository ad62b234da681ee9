"""The process in which a chat template runs: its limits, and that it answers what it is asked."""

import os
import re
import signal

import pytest

from minillama import jinja_renderer
from minillama.chat import Conversation, Turn
from minillama.data.encode import open_chat_template, render_for
from minillama.errors import UserError
from minillama.tokenizer import Tokenizer
from tests.test_chat_template_rules import INST, ONE_TURN, TWO_TURNS, encode


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "1 sec"),
        ("{{ 10 ** (10 ** 10) }}", "runs for more than 1 seconds"),
        ("{{ 'a' * 10 ** 12 }}", "needs more than 1,073,741,824 bytes"),
        ("{% for i in range(9999) %}{{ 'a' * 999 }}{% endfor %}", "writes more than 2,097,"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself too often"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% if %}", "line 1: Expected an expression"),
        ("{% include 'a' %}", "no loader"),
        ("{{ raise_exception('No system, please') }}", "it refuses this conversation (No system"),
        ("{{ messages[7].content.x }}", "no element 7"),
    ],
)
def test_a_template_that_loops_grows_or_reaches_out_is_refused(
    small_tokenizer: Tokenizer, template: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jinja_renderer, "CPU_SECONDS", 1)
    for _ in range(2):  # the second time as well
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            render_for(small_tokenizer, template, ONE_TURN)
    assert "--template NAME" in str(caught.value) and "\n" not in str(caught.value)


def test_what_transformers_offers_to_a_template_is_there(small_tokenizer: Tokenizer) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{{ eos_token }}{% endgeneration %}{% continue %}{% endif %}"
        "{{ {'<é>': m.content} | tojson }}{{ tools }}{{ pad_token }}{% endfor %}"
    )
    pieces = render_for(small_tokenizer, template, ONE_TURN)
    assert pieces[0].text == '{"<é>": "Q"}None'


def test_ctrl_c_while_a_template_runs_leaves_nothing_behind(small_tokenizer: Tokenizer) -> None:
    """The process does not answer the next question with what it was asked before."""
    slow = "{% if m.content == 'slow' %}{% for i in range(99999) %}{% for j in range(99999) %}"
    template = (
        "{% for m in messages %}" + slow + "{% endfor %}{% endfor %}{% endif %}"
        "{{ m.content }}{{ eos_token }}{% endfor %}"
    )

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            render_for(small_tokenizer, template, Conversation((Turn("slow", None),)))
    finally:
        signal.signal(signal.SIGALRM, before)
    for text in ("fast", "again"):
        pieces = render_for(small_tokenizer, template, Conversation((Turn(text, None),)))
        assert pieces[0].text == text


def test_ctrl_c_of_a_terminal_does_not_end_the_renderer(small_tokenizer: Tokenizer) -> None:
    """It reaches every process of the terminal, and a chat goes on after it."""
    expected = encode(small_tokenizer, INST, ONE_TURN)
    renderer = open_chat_template(small_tokenizer, INST).renderer
    process = renderer._process
    assert process is not None
    process.send_signal(signal.SIGINT)
    assert encode(small_tokenizer, INST, ONE_TURN) == expected
    assert renderer._process is process
    process.kill()  # by the system, when memory is short
    process.wait()
    assert encode(small_tokenizer, INST, ONE_TURN) == expected


def test_a_forked_process_starts_its_own_renderer(small_tokenizer: Tokenizer) -> None:
    expected = encode(small_tokenizer, INST, ONE_TURN)
    child = os.fork()
    if child == 0:
        others = [encode(small_tokenizer, INST, TWO_TURNS) for _ in range(100)]
        os._exit(0 if others == [others[0]] * 100 and others[0] != expected else 1)
    for _ in range(100):  # at the same time
        assert encode(small_tokenizer, INST, ONE_TURN) == expected
    assert os.waitpid(child, 0)[1] == 0
