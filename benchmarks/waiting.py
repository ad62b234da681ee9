"""Steps of a small model on a quiet and on a busy machine, by number of threads and way of waiting.

    python benchmarks/waiting.py
    python benchmarks/waiting.py --steps 20 -- --dim 512 --ffn_dim 1408     flags of train.py

Other processes that compute take cores away, and then it matters how OpenMP's threads wait for each
other (minillama/threads.py). Each choice below trains the demo, in a process of its own. Choices
take turns within a round. Wall seconds are those of the training loop (summary.json); CPU seconds
are those of the process, with its start. The last column is what the default costs beside the best
choice; the goal is at most 1.2 in every row.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
OPENMP_DEFAULT = "300000"  # GNU's: about three milliseconds of active waiting
GOAL = 1.2


@dataclass(frozen=True)
class Choice:
    """Flags of train.py and environment variables of one way to run."""

    flags: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


CHOICES = {
    "1 thread": Choice(("--threads", "1")),
    "2 active": Choice(("--threads", "2"), {"GOMP_SPINCOUNT": OPENMP_DEFAULT}),
    "2 passive": Choice(("--threads", "2"), {"OMP_WAIT_POLICY": "passive"}),
    "default": Choice(),
}


@dataclass(frozen=True)
class Seconds:
    """What a run took."""

    wall: float
    cpu: float


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep `count` cores busy during the block."""
    endless = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(endless) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(choice: Choice, steps: int, flags: list[str], cache_dir: Path) -> Seconds:
    """Train the demo for some steps in a new process."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= choice.environment
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "train.py", "--config", "demo", "--out_dir", directory]
        command += ["--max_steps", str(steps), "--eval_strategy", "no", "--save_strategy", "no"]
        command += ["--cache_dir", str(cache_dir), *choice.flags, *flags]
        before = os.times()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        after = os.times()
        if done.returncode != 0:
            sys.exit(done.stderr)
        summary = json.loads((Path(directory) / "summary.json").read_text())
    user = after.children_user - before.children_user
    system = after.children_system - before.children_system
    return Seconds(summary["step_seconds"] * steps, user + system)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", default="0,1,2,4", help="numbers of busy processes [0,1,2,4]")
    parser.add_argument("flags", nargs="*", help="flags of train.py, after --")
    options = parser.parse_args()

    counts = [int(count) for count in options.busy.split(",")]
    runs: dict[tuple[int, str], list[Seconds]] = {}
    with tempfile.TemporaryDirectory() as cache_dir:
        measure(Choice(), 1, options.flags, Path(cache_dir))  # tokenizes the data
        for _ in range(options.rounds):
            for count in counts:
                for name, choice in CHOICES.items():
                    with busy_processes(count):
                        seconds = measure(choice, options.steps, options.flags, Path(cache_dir))
                    runs.setdefault((count, name), []).append(seconds)

    print(f"{options.steps} steps, {os.cpu_count()} CPUs, medians of {options.rounds} rounds:")
    print("wall seconds / CPU seconds")
    print(f"{'busy':8}" + "".join(f"{name:>16}" for name in CHOICES) + f"{'default/best':>16}")
    for count in counts:
        print_row(count, {name: runs[count, name] for name in CHOICES})


def print_row(count: int, runs: dict[str, list[Seconds]]) -> None:
    """Print the medians of one number of busy processes."""
    walls = {}
    cells = ""
    for name, seconds in runs.items():
        walls[name] = statistics.median(run.wall for run in seconds)
        cpu = statistics.median(run.cpu for run in seconds)
        cells += f"{walls[name]:8.2f} /{cpu:6.1f}"
    ratio = walls["default"] / min(walls.values())
    verdict = "" if ratio <= GOAL else f"  above {GOAL}"
    print(f"{count:<8}{cells}{ratio:16.2f}{verdict}")


if __name__ == "__main__":
    main()
