"""The command line that all scripts share: their parser, and how a script ends."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from minillama.compat.flags import HARMLESS, ONLY, RENAMED
from minillama.errors import UserError, closest
from minillama.train_config import DEVICES, KEYS, PRECISIONS, parse_bool, parse_list


class Parser(argparse.ArgumentParser):
    """argparse with this project's manners: `-` and `_` alike in flags, no abbreviations, mistakes as one UserError line."""

    def __init__(self, renamed: dict[str, str] | None = None, **settings: Any) -> None:
        self.renamed = dict(renamed or {})
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        return super().parse_known_args(
            [_ours(word, self.renamed) if word.startswith("--") else word for word in args or ()],
            namespace,
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings] + [
                f"--{name}" for name in self.renamed
            ]
            raise UserError(
                f"unknown argument {unknown[0]}{closest(unknown[0].split('=')[0], known)}; --help lists them all"
            )
        return found

    def refuse(self, found: Any, reason: str, names: Sequence[str]) -> None:
        """UserError where one of the flags `names` was given, which has no meaning for this `reason`."""
        if given := [name for name in names if getattr(found, name) != self.get_default(name)]:
            raise UserError(f"--{given[0]} has no meaning {reason}; leave one of them out")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists every flag")

    def add_model_flags(self) -> None:
        """Which model to load, and how: the same flags for every script that uses one."""
        add = self.add_argument
        add("--ckpt", default="", metavar="DIR", help="checkpoint, run or adapter directory")
        add(
            "--base",
            default="",
            metavar="DIR",
            help="base model of an adapter, where its own config does not say or is wrong",
        )
        add(
            "--lora",
            action="append",
            default=[],
            metavar="DIR",
            help="adapter to add unmerged; may repeat",
        )
        add(
            "--tokenizer",
            default="",
            metavar="FILE",
            help="tokenizer.model or tokenizer.json, where the checkpoint has none",
        )
        add("--device", default="auto", choices=DEVICES, help="[auto]")
        add("--dtype", default="float32", choices=tuple(PRECISIONS), help="[float32]")
        add(
            "--ops",
            default="",
            metavar="FORM",
            help="forms of the ops: reference, fused, auto, …, or some: attention=reference",
        )


def _ours(word: str, renamed: dict[str, str]) -> str:
    flag, equals, value = word[2:].partition("=")
    name = flag.replace("-", "_")
    return f"--{renamed.get(name, name)}{equals}{value}"


BOOLEAN = {
    "nargs": "?",
    "const": True,
    "type": parse_bool,
    "metavar": "true|false",
}  # a flag that stands alone or with a value
FLAG_OF_TYPE = {bool: BOOLEAN, tuple: {"type": parse_list, "metavar": "A,B"}} | {
    kind: {"type": kind, "metavar": kind.__name__} for kind in (int, float, str)
}


def add_keys(parser: Parser) -> None:
    """A flag for each key of `TrainConfig`, in a group for each section, and the flags of other systems."""
    parser.renamed |= RENAMED
    groups = {
        section: parser.add_argument_group(section)
        for section in ("model", "data", "lora", "train", "parallel")
    }
    for name, field in KEYS.items():
        section, help, choices = (field.metadata[part] for part in ("section", "help", "choices"))
        named = f": {', '.join(map(str, choices))}" if choices else ""
        shown = (
            ",".join(field.default)
            if isinstance(field.default, tuple)
            else str(field.default).lower()
        )
        groups[section].add_argument(
            f"--{name}",
            **FLAG_OF_TYPE[type(field.default)],
            default=argparse.SUPPRESS,
            help=f"{help}{named} [{shown}]".replace("%", "%%"),
        )
    for flag in ("fp16", "bf16"):
        groups["train"].add_argument(f"--{flag}", **BOOLEAN, help=f"precision {flag}")
    for flag in (*ONLY, *HARMLESS):
        parser.add_argument(f"--{flag}", nargs="*", help=argparse.SUPPRESS)


def run(main: Callable[[list[str]], int | None], argv: list[str]) -> None:
    """Run a script's `main` and exit: 0 done, 2 the user's mistake (one line on stderr), 130 interrupted.
    `--debug` anywhere in the arguments shows the traceback of a user's mistake too."""
    debug, argv = "--debug" in argv, [word for word in argv if word != "--debug"]
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        sys.exit(main(argv) or 0)
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        message = _message(error)
        if debug or not message:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _message(error: Exception) -> str:
    """One line for the user about an error the user can mend; "": it is a defect of ours."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{f'{error.filename}: ' if error.filename else ''}{error.strerror}; name another path, or make room or rights for this one"
    if text.startswith(
        "Failed to load the backend extension"
    ):  # torch imports all device plug-ins, and fails where one does
        return (
            f"torch's device plug-in {text.split(': ')[1].split('.')[0]} does not load ({error.__cause__}); mend it, or set "
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0 to go on without it"
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        return f"not enough memory; take fewer rows or tokens at once, such as a smaller batch size or length ({text[:120]})"
    return text if isinstance(error, UserError) else ""
