"""A conversation in the terminal."""

from minillama.generation.engine import ChatSession, Engine

QUIT, CLEAR = ("q", "quit", "exit"), ("clear", "new")


def chat_in_terminal(session: Engine, system: str = "", seed: int | None = None) -> None:
    """Ask, answer, until q, quit, exit or the end of input."""
    dialogue = ChatSession(session, system)
    if session.template == "none":
        print(
            "note: no chat template is known for this checkpoint, so it only continues text; choose one with --template NAME"
        )
    print(f"{', '.join(QUIT)}: end    {', '.join(CLEAR)}: start over")
    try:
        while (text := input("\nYou: ").strip()).lower() not in QUIT:
            if text.lower() in CLEAR:
                dialogue.turns = []
                print("(new conversation)")
            elif text:
                _answer(dialogue, text, seed)
    except EOFError:
        print()


def _answer(dialogue: ChatSession, text: str, seed: int | None) -> None:
    print("Answer: ", end="", flush=True)
    try:
        for piece in dialogue.reply(text, seed):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    print(f"\n({dialogue.note})")
