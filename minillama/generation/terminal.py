"""A conversation in the terminal."""

from minillama.errors import UserError
from minillama.generation.session import Dialogue, Session

QUIT, CLEAR = ("q", "quit", "exit"), ("clear", "new")


def chat_in_terminal(session: Session, system: str = "", seed: int | None = None) -> None:
    """Ask, answer, until q, quit, exit or the end of input."""
    dialogue = Dialogue(session, system)
    if session.template == "none":
        print("note: no chat template is known for this checkpoint, so it only continues text; choose one with --template NAME")
    print(f"{', '.join(QUIT)}: end    {', '.join(CLEAR)}: start over")
    while True:
        try:
            text = input("\nYou: ").strip()
        except EOFError:
            print()
            return
        if text.lower() in QUIT:
            return
        if text.lower() in CLEAR:
            dialogue.clear()
            print("(new conversation)")
        elif text:
            _answer(dialogue, text, seed)


def _answer(dialogue: Dialogue, text: str, seed: int | None) -> None:
    try:
        ids, dropped = dialogue.prompt_ids(text)
    except UserError as error:
        print(f"({error})")
        return
    if dropped:
        print(f"({dropped} oldest round{'s' * (dropped > 1)} dropped: the context is full)")
    answer = dialogue.session.ask(ids)
    print("Answer: ", end="", flush=True)
    try:
        for _, piece in dialogue.session.write([answer], seed):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    dialogue.remember(text, answer)
    print(f"\n({len(answer.ids) / max(answer.seconds, 1e-9):.1f} tokens/s)")
