"""The commands of five published documents, and what becomes of each here: the tests type them.

000  LLaMA-7B/13B with FastChat on Ascend
001  Chinese-LLaMA-Alpaca with AscendSpeed
002  LLaMA2 with AscendSpeed
003  Chinese-LLaMA-Alpaca-2 on Cambricon
004  llama2 with LLaMA-Factory on Sophgo
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command as it is printed, without the launcher before its script."""

    document: str
    name: str  # of the test
    words: str
    reason: str = ""  # of an error: the command is refused
    change: str = ""  # what must be changed, for a reader; empty: it works as typed
    changed: str = ""  # the words that work then
    chips: int = 0  # Sophgo's variables are set too, for so many chips

    @property
    def outcome(self) -> str:
        if self.change:
            return "works with a named change"
        return "refused with a reason" if self.reason else "works as typed"


def names_of(commands: tuple[Command, ...]) -> list[str]:
    return [f"{command.document} {command.name}" for command in commands]
