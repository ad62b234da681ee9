"""Peak memory of the conversions, and that it does not grow with the model.

    python benchmarks/convert_memory.py                    1.1B shape, fp16: 7 GB of disk
    python benchmarks/convert_memory.py --models 1.1b,7b   also 7B: 41 GB of disk, some minutes

Builds a synthetic fp16 checkpoint of each shape in a temporary directory and runs each conversion
in a fresh process. The figure is the peak of the process's anonymous memory, RssAnon in
/proc/PID/status, sampled every 5 ms. The resident set would be more: it counts pages of mapped
files too, which the system drops when memory is short.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LIMIT = 1.2  # GB, at the 7B shape


def anonymous_bytes(process_id: int) -> int:
    """The anonymous resident memory of a process; 0 when it has ended."""
    try:
        status = Path(f"/proc/{process_id}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    match = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(match[1]) if match else 0


def measure(command: list[str]) -> tuple[float, float, float]:
    """(CPU seconds, wall seconds, peak GB) of a command. Its failure ends the benchmark."""
    environment = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TRANSFORMERS_VERBOSITY": "error",
    }
    started = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, env=os.environ | environment
    )
    peak = 0
    process_id = 0
    while process_id == 0:
        peak = max(peak, anonymous_bytes(child.pid))
        time.sleep(0.005)
        process_id, status, usage = os.wait4(child.pid, os.WNOHANG)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return usage.ru_utime + usage.ru_stime, time.monotonic() - started, peak / 1e9


def build(kind: str, model: str, directory: str) -> None:
    """In another process.

    `kind` hf, a checkpoint with values that repeat; adapter, a LoRA of rank 8 on all linears.
    """
    subprocess.run(
        [sys.executable, __file__, "--build", kind, "--models", model, "--dir", directory],
        check=True,
    )


def build_here(kind: str, model: str, directory: Path) -> None:
    import json

    import torch

    from minillama.checkpoint.hf_writer import write_weights
    from minillama.files import write_json
    from minillama.hf_config import published, to_hf

    config, generator = published(model), torch.Generator().manual_seed(len(directory.name))
    directory.mkdir()
    if kind == "hf":
        block = (0.02 * torch.randn(2**22 + 1, generator=generator)).half()
        plan = {name: (torch.float16, shape) for name, shape in config.parameter_shapes().items()}
        tensors = (
            (
                name,
                block.repeat(-(-torch.Size(shape).numel() // len(block)))[
                    : torch.Size(shape).numel()
                ].view(shape),
            )
            for name, (_, shape) in plan.items()
        )
        write_weights(directory, tensors, plan)
        write_json(directory / "config.json", to_hf(config, "float16"))
        return
    from safetensors.torch import save_file

    factors = {}
    for name, (out, columns) in (
        (n, s) for n, s in config.parameter_shapes().items() if "layers" in n and len(s) == 2
    ):
        key = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{key}.lora_A.weight"] = 0.02 * torch.randn(8, columns, generator=generator)
        factors[f"{key}.lora_B.weight"] = 0.02 * torch.randn(out, 8, generator=generator)
    save_file(factors, directory / "adapter_model.safetensors")
    targets = sorted({key.split(".")[-3] for key in factors})
    (directory / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": 8,
                "lora_alpha": 16,
                "target_modules": targets,
            }
        )
    )


def require_disk(where: Path, needed: float) -> None:
    free = shutil.disk_usage(where).free / 1e9
    if free < needed + 2:
        sys.exit(
            f"{where}: {needed + 2:.0f} GB of disk needed, {free:.0f} GB are free; name another "
            "place with --dir"
        )


def bench(model: str, where: Path) -> dict[str, float]:
    """Peak GB of each conversion at one shape.

    Never more than three copies of the model on the disk.
    """
    convert, peaks = str(ROOT / "convert.py"), {}
    with tempfile.TemporaryDirectory(dir=where) as folder:

        def run(name: str, *arguments: str, remove: tuple[str, ...] = ()) -> None:
            cpu, wall, peaks[name] = measure([convert, *arguments])
            print(
                f"{model:6} {name:14} {peaks[name]:6.2f} GB   {cpu:6.1f} CPU-s   {wall:6.1f} s",
                flush=True,
            )
            for old in remove:
                shutil.rmtree(f"{folder}/{old}")

        base, other, out, adapter = (
            f"{folder}/{name}" for name in ("base", "other", "out", "adapter")
        )
        build("hf", model, base)
        build("adapter", model, adapter)
        run(
            "merge-lora",
            "merge-lora",
            "--base",
            base,
            "--lora",
            adapter,
            "--output",
            out,
            "--device",
            "cpu",
            remove=("out",),
        )
        build("hf", model, other)
        run(
            "apply-delta",
            "apply-delta",
            "--base",
            base,
            "--delta",
            other,
            "--output",
            out,
            remove=("out", "other"),
        )
        run(
            "meta --reverse",
            "meta",
            "--reverse",
            "--input",
            base,
            "--output",
            other,
            remove=("base",),
        )
        run("meta", "meta", "--input", other, "--output", out)
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="1.1b", help="published shapes, comma-separated [1.1b]")
    parser.add_argument(
        "--dir", default=tempfile.gettempdir(), help="where the temporary directory is made"
    )
    parser.add_argument("--build", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.build:
        return build_here(flags.build, flags.models, Path(flags.dir))
    sizes = {"1.1b": 2.2, "7b": 13.5, "13b": 26.1}
    require_disk(
        Path(flags.dir), 3 * max(sizes.get(model, 140) for model in flags.models.split(","))
    )
    peaks = {model: bench(model, Path(flags.dir)) for model in flags.models.split(",")}
    for model, found in peaks.items():
        print(f"{model}: at most {max(found.values()):.2f} GB (limit {LIMIT} GB)")


if __name__ == "__main__":
    main()
