"""A conversation in the terminal.

Where Python has readline, a line is edited as in a shell: arrow keys, earlier messages, characters
of any width. Ctrl-C ends one thing at a time:

    while an answer is written    the answer; what was written stays in the conversation
    at the prompt                 the line; a second Ctrl-C in a row ends the conversation
"""

import io
import sys
from contextlib import suppress

from minillama.errors import UserError
from minillama.generation.engine import ChatSession, Engine
from minillama.generation.examples import demo_questions
from minillama.generation.ranks import share_from_first

QUIT_WORDS = ("q", "quit", "exit")
CLEAR_WORDS = ("clear", "new")
NO_TEMPLATE = (
    "note: no chat template is known for this checkpoint, so it only continues text; "
    "choose one with --template NAME"
)


def chat_in_terminal(
    engine: Engine,
    system: str = "",
    seed: int | None = None,
    quit_words: tuple[str, ...] = QUIT_WORDS,
) -> None:
    """Read messages and print answers, until one of `quit_words` or the end of input."""
    chat = ChatSession(engine, system)
    prepare_input()
    if engine.template == "none":
        print(NO_TEMPLATE)
    words = [word or "an empty line" for word in quit_words]
    print(f"{', '.join(words)}: end    {', '.join(CLEAR_WORDS)}: start over")
    questions = demo_questions(engine.path)
    if questions:
        print("It was trained on questions such as:")
    for question in questions:
        print(f"  {question}")
    while True:
        own_text = read_message() if engine.mesh.is_first else None
        text = share_from_first(engine.mesh, own_text)
        if text is None or text.lower() in quit_words:
            return
        if text.lower() in CLEAR_WORDS:
            chat = ChatSession(engine, system)
            print("(new conversation)")
        elif text:
            print_answer(chat, text, seed)


def prepare_input() -> None:
    """Edit lines with readline, if there is one, and read bytes that are not UTF-8."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A message that is not UTF-8 is then refused by itself, and the conversation goes on.
        sys.stdin.reconfigure(errors="surrogateescape")
    if sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ImportError):  # not on Windows, whose terminal edits lines itself
            import readline  # noqa: F401  input() uses it once it is imported


def read_message() -> str | None:
    """What the user types, without spaces around it; None at the end of input.

    Raises KeyboardInterrupt for the second Ctrl-C in a row.
    """
    is_second = False
    while True:
        try:
            print()
            return input("You: ").strip()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            if is_second:
                raise
            is_second = True
            print("(Ctrl-C again ends the conversation)")


def print_answer(chat: ChatSession, text: str, seed: int | None) -> None:
    """Print an answer while it is written; Ctrl-C ends it and keeps what was written.

    On several ranks Ctrl-C ends the program: they would stop at different tokens.
    """
    try:
        print("Answer: ", end="", flush=True)
        for piece in chat.reply(text, seed):
            print(piece, end="", flush=True)
        note = chat.note
    except KeyboardInterrupt:
        if chat.engine.mesh.size > 1:
            raise
        print(" (stopped)", end="")
        note = chat.note
    except UserError as error:
        note = str(error)
    print(f"\n({note})")
