"""One NVIDIA card, in under ten minutes: training, the 7B recipe, decoding, attention.

    python benchmarks/cuda.py --out cuda.json             on a card, from a plain checkout
    python benchmarks/cuda.py --device cpu --shape tiny   tries the script itself, on any machine

Needs torch 2.11 or later, and the packages that minillama itself needs; nothing is installed. Each
leg runs in a process of its own, so that its peak memory is its own. A leg that fails is reported,
and the others run. Sides of a comparison take the same batches from the same weights
(cuda_sides.py); a side whose first loss is not that of ours is void. If transformers is not
installed, a plain torch loop takes its place, and is named.

    parity       every op and a model against the formulas on the CPU: the doctor's checks
    training     bf16, tokens/s and memory: ours, theirs, both compiled, recomputed, ZeRO's stages
    7b_lora      train, resume, merge, generate; promised bytes beside counted ones (cuda_7b.py)
    attention    packed documents, beside one kernel call with a mask
    decoding     one text and a batch of eight, beside transformers
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LIMIT = 600.0  # seconds for all legs; those that would begin later are left out
LEG_LIMIT = 300.0  # seconds for one leg
LOSS_TOLERANCE = 2e-2  # between the first losses of two sides, in bf16


@dataclass(frozen=True)
class Leg:
    name: str  # of a function in cuda_legs.LEGS, or "7b_lora"
    shape: str
    rows: int
    length: int
    steps: int = 8
    side: str = ""

    @property
    def title(self) -> str:
        return " ".join(part for part in (self.name, self.shape, self.side) if part)


def legs_for(shape: str, memory_gb: float, peer: str) -> list[Leg]:
    """The legs in the order of their worth: if time runs out, the last are missing."""
    if shape == "tiny":
        return tiny_legs(peer)
    rows = 8 if memory_gb >= 70 else 2
    small = partial(Leg, "train", "110m", 16, 1024)
    large = partial(Leg, "train", "1.1b", rows, 1024)
    return [
        Leg("machine", "110m", 1, 16),
        Leg("parity", "110m", 1, 16),
        small(side="minillama"),
        small(side=peer),
        large(side="minillama"),
        large(side=peer),
        Leg("7b_lora", "7b", 4, 1024),
        Leg("decoding", "1.1b", 1, 1024),
        Leg("attention", "7b", 8, 1024),
        large(side="minillama+recompute"),
        small(side="minillama+zero1"),
        small(side="minillama+zero2"),
        small(side="minillama+compile"),
        small(side=f"{peer}+compile"),
        large(side="minillama+compile"),
        large(side=f"{peer}+compile"),
    ]


def tiny_legs(peer: str) -> list[Leg]:
    legs = [Leg("machine", "tiny", 1, 16), Leg("parity", "tiny", 1, 16)]
    options = ("minillama", peer, "minillama+recompute", "minillama+zero1", "minillama+zero2")
    for side in options:
        legs.append(Leg("train", "tiny", 2, 64, steps=2, side=side))
    legs.append(Leg("7b_lora", "tiny", 4, 256))
    legs.append(Leg("decoding", "tiny", 1, 64))
    legs.append(Leg("attention", "tiny", 4, 64))
    return legs


def run_leg(leg: Leg, device: str, seconds: float) -> dict[str, Any]:
    """Run a leg in a fresh process; what it found, or why it found nothing."""
    command = [sys.executable, __file__, "--device", device, "--leg", json.dumps(vars(leg))]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=min(seconds, LEG_LIMIT)
        )
    except subprocess.TimeoutExpired:
        return {"failed": "it took too long"}
    if done.returncode:
        return {"failed": done.stderr[-3000:]}
    return json.loads(done.stdout.splitlines()[-1])


def be_leg(leg: Leg, device_name: str) -> dict[str, Any]:
    """Run a leg in this process."""
    from benchmarks import cuda_7b, cuda_legs
    from minillama import device as devices

    device = devices.pick(device_name)
    settings = cuda_legs.Settings(device, leg.shape, leg.rows, leg.length, leg.steps, leg.side)
    if leg.name != "7b_lora":
        return cuda_legs.LEGS[leg.name](settings)
    with tempfile.TemporaryDirectory() as folder:
        return cuda_7b.lora_7b(settings, Path(folder))


def describe(found: dict[str, Any]) -> str:
    """A leg's figures in one line."""
    if "failed" in found:
        return "FAILED: " + found["failed"].strip().rpartition("\n")[2]
    parts = []
    for name, value in found.items():
        if name.endswith("_bytes") and value is not None:
            value = f"{value / 1e9:.2f} GB"
        elif isinstance(value, float):
            value = f"{value:.4g}"
        parts.append(f"{name} {value}")
    return ", ".join(parts)


def compare(results: dict[str, dict[str, Any]]) -> list[str]:
    """Each side of a training leg beside minillama's: speed, memory, and whether it counts."""
    lines = []
    for title, found in results.items():
        name, _, rest = title.partition(" ")
        shape, _, side = rest.partition(" ")
        ours = results.get(f"train {shape} minillama", {})
        if name != "train" or side == "minillama" or "failed" in found or "failed" in ours:
            continue
        speed = ours["tokens_per_second"] / found["tokens_per_second"]
        line = f"{shape}: minillama is {speed:.2f} x {side}"
        if found["peak_bytes"] and ours["peak_bytes"]:
            line += f", at {ours['peak_bytes'] / found['peak_bytes']:.2f} of its memory"
        if abs(found["first_loss"] - ours["first_loss"]) > LOSS_TOLERANCE:
            line += "; VOID: the first losses differ"
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--shape", default="", help="tiny: a smoke test of this script")
    parser.add_argument("--legs", default="", help="names of legs, such as train,decoding")
    parser.add_argument("--out", default="", help="a JSON file for what was found")
    parser.add_argument("--leg", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.leg:
        print(json.dumps(be_leg(Leg(**json.loads(options.leg)), options.device)))
        return
    import torch

    memory_gb = 0.0
    if options.device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("no NVIDIA card here; --device cpu --shape tiny tries the script")
        memory_gb = torch.cuda.get_device_properties(0).total_memory / 1e9
    elif options.shape != "tiny":
        raise SystemExit("the CPU takes --shape tiny only")
    peer = "transformers" if find_spec("transformers") else "loop"
    chosen = options.legs.split(",") if options.legs else []
    results: dict[str, dict[str, Any]] = {}
    started = time.perf_counter()
    for leg in legs_for(options.shape, memory_gb, peer):
        if chosen and leg.name not in chosen:
            continue
        left = LIMIT - (time.perf_counter() - started)
        if left < 0:
            print(f"{leg.title}: left out, no time")
            continue
        found = run_leg(leg, options.device, left)
        results[leg.title] = found
        print(f"{leg.title}: {describe(found)}", flush=True)
        if options.out:
            Path(options.out).write_text(json.dumps(results, indent=2), encoding="utf-8")
    print("\n".join(["", *compare(results)]))
    print(f"\n{time.perf_counter() - started:.0f} s")
    if any("failed" in found for found in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
