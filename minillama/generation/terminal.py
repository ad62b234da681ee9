"""A conversation in the terminal."""

import io
import sys

from minillama.generation.engine import ChatSession, Engine

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
    """Read messages and print completions, until one of `quit_words` or the end of input."""
    chat = ChatSession(engine, system)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A message that is not UTF-8 is then refused by itself, and the conversation goes on.
        sys.stdin.reconfigure(errors="surrogateescape")
    if engine.template == "none":
        print(NO_TEMPLATE)
    words = [word or "an empty line" for word in quit_words]
    print(f"{', '.join(words)}: end    {', '.join(CLEAR_WORDS)}: start over")
    while True:
        try:
            text = input("\nYou: ").strip()
        except EOFError:
            print()
            return
        if text.lower() in quit_words:
            return
        if text.lower() in CLEAR_WORDS:
            chat.turns = []
            print("(new conversation)")
        elif text:
            print_completion(chat, text, seed)


def print_completion(chat: ChatSession, text: str, seed: int | None) -> None:
    """Print a completion while it is written; Ctrl-C stops it and keeps what was written."""
    print("Answer: ", end="", flush=True)
    try:
        for piece in chat.reply(text, seed):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    print(f"\n({chat.note})")
