"""All benchmarks that make figures of README and docs, one after the other, and one report.

    python benchmarks/all.py --out runs/benchmarks --data alpaca.json --tokenizer tokenizer.model
    python benchmarks/all.py --out runs/benchmarks --only training,generation
    python benchmarks/all.py --list                             the commands, without running them

Writes DIR/NAME.txt as each benchmark prints it, and DIR/report.md: the machine, and for each
benchmark its command, how busy the machine was when it began, and its output. A benchmark that
fails is reported, and the others run; the exit code is then 1. benchmarks/README.md says which
figure comes from which benchmark.

It takes about an hour on two cores. A machine that does other work gives other figures, so run
this on a quiet one. `finetuning` needs --data and --tokenizer, and is left out without them.
"""

import argparse
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from minillama.threads import prepare_environment

ROOT = Path(__file__).resolve().parent.parent
BUSY = 0.5  # load average above which other work is likely
SETTLING_SECONDS = 60  # the load average is that of the last minute, so wait before reading it


@dataclass(frozen=True)
class Benchmark:
    """A script of this folder with its arguments. Peers that are not installed are left out."""

    name: str
    words: str
    page: str  # of docs/, whose figures it makes

    def command(self) -> list[str]:
        script, *arguments = shlex.split(self.words)
        return [sys.executable, f"benchmarks/{script}", *arguments]


BENCHMARKS = (
    Benchmark("waiting", "waiting.py --steps 15 --rounds 3 --busy 0,2", "ops.md"),
    Benchmark("cpu_linear", "cpu_linear.py --rounds 3", "ops.md"),
    Benchmark("ops", "ops.py --rounds 3 --tokens 512 --forms reference,fused,torch", "ops.md"),
    Benchmark("training", "training.py --shape 15m --rounds 3 --steps 2", "ops.md"),
    Benchmark("training_110m", "training.py --shape 110m --rounds 3 --steps 1", "ops.md"),
    Benchmark("generation", "generation.py --models 110m --threads 2 --rounds 3", "decoding.md"),
    Benchmark("startup", "generation.py --startup --rounds 3", "decoding.md"),
    Benchmark("data_parallel", "data_parallel.py --rounds 3 --steps 1", "zero.md"),
    Benchmark("model_parallel", "model_parallel.py --rounds 3 --steps 1", "parallel.md"),
)


def machine() -> str:
    """One line: CPU, cores, torch."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {os.cpu_count()} CPUs, {capability}, torch {torch.__version__}"


def load_average() -> float:
    return os.getloadavg()[0]


def run(benchmark: Benchmark, out: Path) -> str:
    """Run a benchmark, write what it prints, and return its section of the report."""
    load = load_average()
    note = "; other work may be running" if load > BUSY else ""
    shown = shlex.join(["python", *benchmark.command()[1:]])
    print(f"{benchmark.name}: load {load:.2f}{note}\n$ {shown}", flush=True)
    began = time.monotonic()
    done = subprocess.run(benchmark.command(), cwd=ROOT, capture_output=True, text=True)
    minutes = (time.monotonic() - began) / 60
    (out / f"{benchmark.name}.txt").write_text(done.stdout + done.stderr)
    failed = f"**FAILED** with exit code {done.returncode}. " if done.returncode else ""
    print(f"{failed}{minutes:.1f} minutes", flush=True)
    printed = done.stderr if done.returncode else done.stdout
    return (
        f"## {benchmark.name}\n\n"
        f"For docs/{benchmark.page}. {failed}Load before it: {load:.2f}{note}. "
        f"It took {minutes:.1f} minutes.\n\n"
        f"```\n$ {shown}\n{printed.rstrip()}\n```\n"
    )


def chosen(options: argparse.Namespace) -> list[Benchmark]:
    """The benchmarks of --only, a comma-separated list; all of them if it is empty."""
    benchmarks = list(BENCHMARKS)
    if options.data and options.tokenizer:
        files = shlex.join(["--data", options.data, "--tokenizer", options.tokenizer])
        benchmarks.append(Benchmark("finetuning", f"finetuning.py --rounds 3 {files}", "data.md"))
    names = [benchmark.name for benchmark in benchmarks]
    wanted = options.only.split(",") if options.only else names
    for name in wanted:
        if name not in names:
            sys.exit(f"--only {name}: there are {', '.join(names)}")
    return [benchmark for benchmark in benchmarks if benchmark.name in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--only", default="", help="names, comma-separated")
    parser.add_argument("--data", default="", help="instruction records, for finetuning")
    parser.add_argument("--tokenizer", default="", help="a tokenizer.model, for finetuning")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    options = parser.parse_args()
    benchmarks = chosen(options)
    if options.list:
        for benchmark in benchmarks:
            print(f"{benchmark.name:16}{shlex.join(['python', *benchmark.command()[1:]])}")
        return

    prepare_environment()  # threads wait as those of our commands do; the benchmarks inherit it
    options.out.mkdir(parents=True, exist_ok=True)
    report = options.out / "report.md"
    sections = [f"# Benchmarks\n\n{machine()}\n"]
    for number, benchmark in enumerate(benchmarks):
        if number > 0:
            time.sleep(SETTLING_SECONDS)
        sections.append(run(benchmark, options.out))
        report.write_text("\n".join(sections))
    print(f"wrote {report}")
    if any("**FAILED**" in section for section in sections):
        sys.exit(1)


if __name__ == "__main__":
    main()
