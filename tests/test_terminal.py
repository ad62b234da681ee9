"""The conversation in the terminal: editing a line, Ctrl-C, and the questions of the demo."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from minillama.chat import Turn
from minillama.data import demo
from minillama.generation import terminal
from minillama.generation.config import GenerationConfig
from minillama.generation.engine import ChatSession, Engine
from minillama.generation.examples import demo_questions
from minillama.generation.loading import LoadOptions, load_engine

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden/model"
QUESTION = "Which number is larger, 31 or 62?"
CTRL_A = "\x01"
BACKSPACE = "\x7f"
UP = "\x1b[A"


@pytest.fixture
def engine() -> Engine:
    config = GenerationConfig(template="llama_factory_default", greedy=True, max_new_tokens=24)
    return load_engine(LoadOptions(str(GOLDEN), device="cpu"), config)


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """Let input() return these lines, or raise these exceptions, one after the other."""
    remaining = list(lines)

    def typed(prompt: str) -> str:
        line = remaining.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typed)


def test_ctrl_c_ends_an_answer_and_not_the_chat(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """What was written before Ctrl-C is printed, and the next message is answered."""
    messages = []

    def reply(chat: ChatSession, text: str, seed: int | None) -> Iterator[str]:
        messages.append(text)
        yield "begin"
        if text == "long":
            raise KeyboardInterrupt
        yield " end"

    monkeypatch.setattr(ChatSession, "reply", reply)
    type_lines(monkeypatch, "long", "short", "q")
    terminal.chat_in_terminal(engine)
    printed = capsys.readouterr().out
    assert messages == ["long", "short"]
    assert "Answer: begin (stopped)\n" in printed
    assert "Answer: begin end\n" in printed


def test_a_stopped_answer_stays_in_the_conversation(engine: Engine) -> None:
    chat = ChatSession(engine)
    answer = chat.reply("Please repeat cat, dog and owl.")
    for _ in range(3):
        next(answer)
    with pytest.raises(KeyboardInterrupt):
        answer.throw(KeyboardInterrupt)
    assert chat.turns == [Turn("Please repeat cat, dog and owl.", "cat,")]


def test_ctrl_c_at_the_prompt_discards_the_line_and_a_second_one_ends(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    type_lines(monkeypatch, KeyboardInterrupt, QUESTION, KeyboardInterrupt, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        terminal.chat_in_terminal(engine)
    printed = capsys.readouterr().out
    assert "Answer: 62\n" in printed
    assert printed.count("(Ctrl-C again ends the conversation)") == 2


def test_an_empty_line_asks_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    type_lines(monkeypatch, "", "   ", EOFError)
    terminal.chat_in_terminal(engine)
    assert "Answer" not in capsys.readouterr().out


def test_a_message_that_does_not_fit_is_refused_and_the_chat_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    type_lines(monkeypatch, "cat " * 600, QUESTION, "q")
    terminal.chat_in_terminal(engine)
    printed = capsys.readouterr().out
    assert "(this message alone has" in printed
    assert "Answer: 62\n" in printed


class Screen:
    """The other side of a pseudo-terminal: what a program prints there, and what is typed."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.printed = b""

    def wait_for(self, text: str, times: int) -> str:
        """All that was printed, as soon as `text` is in it that many times."""
        give_up = time.monotonic() + 120
        while self.printed.count(text.encode()) < times:
            assert time.monotonic() < give_up, self.printed
            readable, _, _ = select.select([self.handle], [], [], 1.0)
            if readable:
                self.printed += os.read(self.handle, 4096)
        return self.printed.decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self.handle, text.encode())


def test_a_line_can_be_edited_and_an_earlier_one_taken_again() -> None:
    """Ctrl-A goes to the beginning, Backspace deletes a wide character, Up is the last line."""
    pytest.importorskip("readline")
    pty = pytest.importorskip("pty")
    our_side, program_side = pty.openpty()
    command = [sys.executable, "generate.py", "--ckpt", str(GOLDEN), "--chat", "--greedy"]
    command += ["--template", "llama_factory_default", "--max_new_tokens", "24"]
    program = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=program_side,
        stdout=program_side,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"LC_ALL": "C.UTF-8", "TERM": "dumb", "OMP_NUM_THREADS": "1"},
    )
    os.close(program_side)
    screen = Screen(our_side)
    screen.wait_for("\nYou: ", times=1)
    screen.type(f"hich number is larger, 31 or 62?中{BACKSPACE}{CTRL_A}W\n")
    assert "Answer: 62\r\n" in screen.wait_for("tokens/s)", times=1)
    screen.wait_for("\nYou: ", times=2)
    screen.type("clear\n")
    screen.wait_for("\nYou: ", times=3)
    screen.type(f"{UP}{UP}\n")
    assert screen.wait_for("tokens/s)", times=2).count("Answer: 62\r\n") == 2
    screen.wait_for("\nYou: ", times=4)
    screen.type("q\n")
    assert program.wait(timeout=60) == 0
    os.close(our_side)


def write_about(directory: Path, **settings: object) -> Path:
    """A model directory as far as minillama.json."""
    (directory / "minillama.json").write_text(json.dumps({"settings": settings}))
    return directory


@pytest.mark.parametrize("name", demo.SUGGESTED)
def test_the_demo_suggests_held_out_questions_of_the_kinds_it_knows(
    name: str, tmp_path: Path
) -> None:
    directory = write_about(tmp_path, data=[name])
    questions = demo_questions(directory)
    assert len(questions) == 3
    assert all(demo.is_held_out(question) for question in questions)
    assert set(demo.SUGGESTED[name]) <= set(demo.PRESETS[name][0])


@pytest.mark.parametrize(
    "settings",
    [
        {"data": ["data/demo.json"]},  # a file of the user
        {"data": "demo"},
        {"data": 5},
        {},
    ],
)
def test_another_model_suggests_nothing(settings: dict, tmp_path: Path) -> None:
    assert demo_questions(write_about(tmp_path, **settings)) == []
    assert demo_questions(None) == []
    assert demo_questions(GOLDEN) == []


def test_the_chat_of_the_demo_begins_with_its_questions(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    engine.path = write_about(tmp_path, data=["demo"])
    type_lines(monkeypatch, "q")
    terminal.chat_in_terminal(engine)
    printed = capsys.readouterr().out
    for question in demo.suggested_questions("demo"):
        assert f"  {question}\n" in printed
