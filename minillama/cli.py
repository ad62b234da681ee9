"""The command line that all scripts share: their parser, and how a script ends.

    sys.argv -> Parser -> flags -> main -> exit code: 0 done, 2 mistake of the user, 130 Ctrl-C

A mistake of the user is a `UserError` wherever it is found. `run` prints it as one line. Every
other exception is a defect of minillama and keeps its traceback.
"""

import argparse
import io
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from minillama import requirements
from minillama.errors import UserError, closest
from minillama.train_config import DEVICES, KEYS, PRECISIONS, SECTIONS, Key, parse_list

SETTINGS_FILES = (".yaml", ".yml", ".toml")
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def parse_bool(text: str) -> bool:
    """Return the value of a boolean flag, for argparse."""
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return BOOLEANS[text.lower()]


class JoinLists(argparse.Action):
    """A list, whose parts may be separated by commas, by spaces, or by both."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,  # a tuple for each word, by `parse_list`
        option_string: str | None = None,
    ) -> None:
        parts: list[str] = []
        for value in values:
            parts += value
        setattr(namespace, self.dest, tuple(parts))


def parse_dtype(text: str) -> str:
    """Return torch's name of a dtype, for argparse: float16 for fp16 as well."""
    names = {short: name for name, short in PRECISIONS.items()}
    return names.get(text, text)


# Keywords of add_argument, by the type of a flag. A boolean flag stands alone or with a value.
BOOLEAN: dict[str, Any] = {
    "nargs": "?",
    "const": True,
    "type": parse_bool,
    "metavar": "true|false",
}
KEYWORDS: dict[type, dict[str, Any]] = {
    bool: BOOLEAN,
    tuple: {"nargs": "+", "action": JoinLists, "type": parse_list, "metavar": "A,B"},
    int: {"type": int, "metavar": "int"},
    float: {"type": float, "metavar": "float"},
    str: {"type": str, "metavar": "str"},
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with three differences.

    Flags may be typed with `-` or `_`. They may have other names, which `renamed` maps to ours.
    A mistake raises UserError and names the closest flag; flags cannot be abbreviated.
    """

    def __init__(
        self,
        renamed: Mapping[str, str] | None = None,
        prog: str | None = None,
        description: str | None = None,
        usage: str | None = None,
    ) -> None:
        super().__init__(
            prog=prog,
            description=description,
            usage=usage,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.renamed = dict(renamed or {})
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse_args(self, args: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        words = [self._our_name(word) for word in args]
        flags, unknown = self.parse_known_args(words)
        if unknown:
            known = [f"--{name}" for name in self.renamed]
            for action in self._actions:
                known.extend(action.option_strings)
            hint = closest(unknown[0].partition("=")[0], known)
            files = [word for word in unknown if Path(word).suffix in SETTINGS_FILES]
            if files and "--config" in known:
                hint = f"; a file of settings is given as --config {files[0]}"
            raise UserError(f"unknown argument {unknown[0]}{hint}; --help lists them all")
        return flags

    def _our_name(self, word: str) -> str:
        """Return --learning_rate=1 for --learning-rate=1 and for --lr=1, and other words as is."""
        if not word.startswith("--"):
            return word
        flag, equals, value = word[2:].partition("=")
        name = flag.replace("-", "_")
        return f"--{self.renamed.get(name, name)}{equals}{value}"

    def refuse(self, flags: argparse.Namespace, reason: str, names: Sequence[str]) -> None:
        """Raise UserError if one of the flags `names` was given; `reason` says why."""
        for name in names:
            if getattr(flags, name) != self.get_default(name):
                raise UserError(f"--{name} has no meaning {reason}; leave one of them out")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists every flag")

    def add_model_flags(self) -> None:
        """Add the flags of every script that loads a model: which one, and how."""
        add = self.add_argument
        add("--ckpt", default="", metavar="DIR", help="checkpoint, run or adapter directory")
        base = "base model of an adapter, if the adapter's own config names none or a wrong one"
        add("--base", default="", metavar="DIR", help=base)
        lora = "adapter to add unmerged; may repeat"
        add("--lora", action="append", default=[], metavar="DIR", help=lora)
        tokenizer = "tokenizer.model or tokenizer.json, if the checkpoint has none"
        add("--tokenizer", default="", metavar="FILE", help=tokenizer)
        add("--device", default="auto", choices=DEVICES, help="[auto]")
        devices = "devices that share out the layers: 2, or npu:0,npu:1"
        add("--devices", default="", metavar="N|A,B", help=devices)
        ranks = "ranks, started by torchrun, that divide the model among them [1]"
        add("--tensor_parallel", type=int, default=1, metavar="N", help=ranks)
        names = (*PRECISIONS, "int8")
        dtype = "of the computation; int8: of the weights, computed in bfloat16 [float32]"
        add("--dtype", default="float32", type=parse_dtype, choices=names, help=dtype)
        ops = "implementations of the ops: reference, fused, auto, …, or by op: attention=reference"
        add("--ops", default="", metavar="NAME", help=ops)


def add_keys(parser: Parser) -> None:
    """Add a flag for each key of TrainConfig, in a group for each section.

    A flag that is not given is absent from the parsed flags, so that a preset's value stays.
    """
    groups = {section: parser.add_argument_group(section) for section in SECTIONS}
    for name, key in KEYS.items():
        groups[key.section].add_argument(
            f"--{name}",
            **KEYWORDS[type(key.default)],
            default=argparse.SUPPRESS,
            help=_help_of(key),
        )
    for name in ("fp16", "bf16"):
        groups["train"].add_argument(f"--{name}", **BOOLEAN, help=f"precision {name}")


def _help_of(key: Key) -> str:
    """Return "help text: choice, choice [default]", with argparse's percent sign escaped."""
    choices = ", ".join(str(choice) for choice in key.choices)
    default = str(key.default).lower()
    if isinstance(key.default, tuple):
        default = ",".join(key.default)
    text = f"{key.help}: {choices} [{default}]" if choices else f"{key.help} [{default}]"
    return text.replace("%", "%%")


def run(main: Callable[[list[str]], int | None], arguments: list[str]) -> NoReturn:
    """Run a script's `main` and exit: 0 done, 2 the user's mistake, 130 interrupted.

    A mistake becomes one line on stderr; with --debug anywhere in the arguments, a traceback.
    """
    print_any_character()
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        requirements.refuse_old_torch()
        sys.exit(main(arguments) or 0)
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        message = _message_of(error)
        if debug or not message:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def print_any_character() -> None:
    """Print characters that a terminal's encoding lacks as \\u1234, instead of failing.

    Such an encoding is ASCII or GBK. UTF-8 lacks nothing but lone surrogates.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _message_of(error: Exception) -> str:
    """Return one line about an error that the user can repair, or "" for a defect of minillama."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}; name another path, or make room or rights for this one"
    if text.startswith("Failed to load the backend extension"):  # torch imports all plug-ins
        plugin = text.split(": ")[1].split(".")[0]
        return (
            f"torch's device plug-in {plugin} does not load ({error.__cause__}); repair it, or set "
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0 to continue without it"
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        return f"not enough memory; use a smaller batch size or length ({text[:120]})"
    return ""
