"""Run the commands of README.md, CONTRIBUTING.md and docs/, and compare what they print.

    python -m docs.check               every page: half an hour, most of it training
    python -m docs.check docs/lora.md  some pages
    python -m docs.check --quick       the commands that the tests run too

A command stands in a block of `bash`, and what it prints in the block behind it. Words behind
`bash`, which a reader of the page does not see, say how it is checked:

    bash           it runs, in a copy of the working tree
    bash quick     it takes seconds: tests/test_docs.py runs it too
    bash demo      it needs runs/demo: `python train.py` makes that first
    bash install   the same, without what pip installs
    bash yours     it names files of the reader: it is parsed, and a training run is planned
    bash skip      it installs packages, takes too long, or waits for a person

compare_output.py says which differences do not matter. An output with a line "error: …" belongs to
exit code 2, any other one to 0.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from docs.compare_output import first_difference
from docs.understand import why_not_understood

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"^```bash *(?P<words>[^\n]*)\n(?P<command>.*?)^```$"
    r"(?:\s*^```(?:text)?\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
WORDS = {"quick", "demo", "install", "yours", "skip"}
INSTALLATION = re.compile(r"python -m pip install [^&\n]*(?:&& )?")
LINK = re.compile(r"\]\(([\w/]+\.md)\)")
MADE = {"runs", "build", "dist", "__pycache__"}  # folders of a tree that has been used
MAKE_DEMO = "python train.py"
LONGEST = 1800  # seconds that a command may take


@dataclass(frozen=True)
class Block:
    """A command of a page, and what it prints."""

    page: str
    line: int
    words: frozenset[str]
    command: str
    output: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """README, the pages of docs/ in reading order, and CONTRIBUTING."""
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    in_order = [f"docs/{link}" for link in LINK.findall(index)]
    others = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    readmes = [path.name for path in sorted(ROOT.glob("README*.md"))]
    return list(dict.fromkeys([*readmes, *in_order, *others, "CONTRIBUTING.md"]))


def read_blocks(page: str) -> list[Block]:
    """The commands of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        words = frozenset(match["words"].split())
        blocks.append(Block(page, line, words, match["command"], match["output"] or ""))
    return blocks


def copy_tree(folder: Path) -> Path:
    """Copy what a clone of the working tree would have; returns the copy."""
    copy = folder / "minillama"
    for name in files_of_tree():
        source = ROOT / name
        if source.is_file():
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    return copy


def files_of_tree() -> list[str]:
    """The files that git does not ignore. Of a tree without git, what no command here has made."""
    if (ROOT / ".git").exists():
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()
    names = []
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if not any(part.startswith(".") or part in MADE for part in parts):
            names.append("/".join(parts))
    return names


def run_block(block: Block, copy: Path) -> str:
    """Run a command in a copy; returns what is wrong, or ""."""
    command = block.command
    if "install" in block.words:
        command = INSTALLATION.sub("", command)
    code, printed = run_command(command, copy)
    is_error = re.search(r"^error:", block.output, re.MULTILINE)
    expected_code = 2 if is_error else 0
    if code != expected_code:
        return f"exit code {code}\n{printed[-2000:]}"
    return first_difference(block.output, printed)


def run_command(command: str, copy: Path) -> tuple[int, str]:
    """Exit code and output of a command."""
    environment = dict(os.environ)
    for name in list(environment):
        if name.startswith("MINILLAMA_"):
            del environment[name]
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["PYTHONPATH"] = str(copy)
    environment["XDG_CACHE_HOME"] = str(copy / ".cache")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=copy,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=LONGEST,
    )
    printed = done.stdout.decode(errors="replace").replace(f"{copy}/", "")
    return done.returncode, without_progress_bars(printed)


def without_progress_bars(printed: str) -> str:
    """What stays on a terminal: of a line, what was written after its last return to the start."""
    lines = [line.rpartition("\r")[2] for line in printed.split("\n")]
    return "\n".join(line for line in lines if "%|" not in line)


def check_block(block: Block, copy: Path) -> str:
    """Check a command as its words say; returns what is wrong, or ""."""
    if "yours" in block.words:
        return why_not_understood(block.command)
    if "demo" in block.words and not (copy / "runs/demo/final").is_dir():
        code, printed = run_command(MAKE_DEMO, copy)
        if code != 0:
            return f"{MAKE_DEMO}: exit code {code}\n{printed[-2000:]}"
    return run_block(block, copy)


def check_pages(names: Iterable[str], only_quick: bool) -> int:
    """Check some pages in one copy; returns how many commands were wrong."""
    num_wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_tree(Path(folder))
        for name in names:
            for block in read_blocks(name):
                if "skip" in block.words or (only_quick and "quick" not in block.words):
                    continue
                problem = check_block(block, copy)
                num_wrong += bool(problem)
                first_line = block.command.splitlines()[0]
                print(f"{'WRONG' if problem else 'ok':6}{block.place:32}{first_line}", flush=True)
                if problem:
                    print(f"      {problem}", flush=True)
    return num_wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m docs.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="README.md, docs/lora.md, …")
    parser.add_argument("--quick", action="store_true", help="only the commands of the tests")
    options = parser.parse_args()
    known = pages()
    for name in options.pages:
        if name not in known:
            parser.error(f"{name}: not one of {', '.join(known)}")
    num_wrong = check_pages(options.pages or known, options.quick)
    print("every command prints what its page says" if not num_wrong else f"{num_wrong} wrong")
    sys.exit(bool(num_wrong))


if __name__ == "__main__":
    main()
