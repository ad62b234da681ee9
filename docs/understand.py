"""Whether a command with files of the reader's own is one that the scripts understand.

LLAMA_DIR and alpaca_data.json are not in a clone, so such a command is not run. Instead its flags
are parsed, a training run is planned at the size that its preset names, and a conversion has to
miss nothing but the files.
"""

import contextlib
import io
import os
import re
import runpy
import shlex
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from minillama.errors import UserError
from minillama.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train.py", "generate.py", "eval.py", "convert.py")
MISSING = re.compile(r"no such|not there|missing|does not exist|holds no|is no directory")


def why_not_understood(text: str) -> str:
    """What is wrong with the commands of a block; "" if nothing is."""
    joined = text.replace("\\\n", " ")
    for line in re.split(r"\n|&&", joined):
        words = shlex.split(line, comments=True)
        script = next((word for word in words if word in SCRIPTS), None)
        if script is None:
            continue
        launcher = words[: words.index(script)]
        arguments = words[words.index(script) + 1 :]
        try:
            CHECKS[script](arguments, num_ranks(launcher))
        except UserError as error:
            return f"{script}: {error}"
    return ""


def num_ranks(launcher: list[str]) -> int:
    """How many ranks torchrun starts; 1 without it."""
    ranks = 1
    for flag in ("--nnodes", "--nproc_per_node"):
        if flag in launcher:
            ranks *= int(launcher[launcher.index(flag) + 1])
    return ranks


def load_script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / name))


def plan_training(arguments: list[str], ranks: int) -> None:
    """Plan a run as --dry_run does. A checkpoint that is not there has its preset's size."""
    from minillama.training import dry_run

    with environment_of(ranks):
        config, _ = load_script("train.py")["parse"](arguments)
    dry_run.describe(with_published_size(config, arguments), ranks)


def with_published_size(config: TrainConfig, arguments: list[str]) -> TrainConfig:
    """The settings without the files of a reader: a model of the size that the preset names."""
    if not config.ckpt or Path(config.ckpt).is_dir():
        return config
    size = re.search(r"(\d+b)(?:_|$)", " ".join(arguments))
    return replace(
        config, ckpt="", adapter="", init="scratch", model=config.model or (size or ["7b"])[0]
    )


def parse_only(script: str) -> Callable[[list[str], int], None]:
    def check(arguments: list[str], ranks: int) -> None:
        load_script(script)["parse"](arguments)

    return check


def convert(arguments: list[str], ranks: int) -> None:
    """Start a conversion where none of its files is: it has to miss one of them."""
    main = load_script("convert.py")["main"]
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(folder)
        try:
            main(arguments)
        except UserError as error:
            if not MISSING.search(str(error)):
                raise
        finally:
            os.chdir(before)


@contextlib.contextmanager
def environment_of(ranks: int) -> Iterator[None]:
    """Be, for the parser, the first of several ranks."""
    started = {
        "WORLD_SIZE": str(ranks),
        "RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
    }
    before = dict(os.environ)
    os.environ.update(started)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


CHECKS: dict[str, Callable[[list[str], int], None]] = {
    "train.py": plan_training,
    "generate.py": parse_only("generate.py"),
    "eval.py": parse_only("eval.py"),
    "convert.py": convert,
}
