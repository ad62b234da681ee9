"""How long until a user sees something: importing the model and `--help`, beside transformers.

    python benchmarks/startup.py

Fresh processes, taking turns; medians of CPU and wall seconds with the smallest and largest.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "minillama.model": [sys.executable, "-c", "from minillama.model import Llama"],
    "transformers": [sys.executable, "-c", "from transformers import LlamaForCausalLM"],
    "generate.py --help": [sys.executable, "generate.py", "--help"],
    "train.py --help": [sys.executable, "train.py", "--help"],
}


def measure(command: list[str]) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of a process."""
    began, before = time.perf_counter(), os.times()
    subprocess.run(
        command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    after = os.times()
    return (
        after.children_user + after.children_system - before.children_user - before.children_system,
        time.perf_counter() - began,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    found = {name: [] for name in COMMANDS}
    for _ in range(options.rounds + 1):
        for name, command in COMMANDS.items():
            found[name].append(measure(command))
    theirs = [cpu for cpu, _ in found["transformers"][1:]]
    for name, runs in found.items():
        cpu, wall = (
            [run[i] for run in runs[1:]] for i in (0, 1)
        )  # the first warms the disk's cache
        ratio = statistics.median(ours / other for ours, other in zip(cpu, theirs, strict=True))
        print(
            f"{name:22} CPU {spread(cpu)} s   wall {spread(wall)} s   of transformers' CPU "
            f"{ratio:.2f}"
        )


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


if __name__ == "__main__":
    main()
