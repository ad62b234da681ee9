"""The ways of `ops.cpu_linear` beside torch's own product, in CPU milliseconds.

    python benchmarks/cpu_linear.py                    decoding and training, some minutes
    python benchmarks/cpu_linear.py --rounds 3 --width 768

Decoding: x W^T of a few rows without gradients. `torch` is F.linear, `fp32` products of fp32
copies, `packed` the weight in oneDNN's order.
Training: forward and backward of many rows. A figure is the median over rounds, in which the ways
take turns.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama.ops import cpu_linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DECODING_ROWS = (1, 2, 3, 4, 6, 8, 16)
TRAINING_ROWS = 512


def time_in_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Way -> median CPU milliseconds of a call."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):  # the first round warms up
        for name, way in ways.items():
            start = time.process_time()
            way()
            times[name].append((time.process_time() - start) * 1e3)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def decoding_ways(x: Tensor, weight: Tensor) -> dict[str, Callable[[], object]]:
    ways: dict[str, Callable[[], object]] = {"torch": lambda: F.linear(x, weight)}
    if weight.dtype is not torch.float32:
        ways["fp32"] = lambda: cpu_linear.linear_in_fp32(x, weight, None)
    can_pack_bf16 = cpu_linear.has_bf16_units()
    if weight.dtype is torch.float32 or (weight.dtype is torch.bfloat16 and can_pack_bf16):
        packed = cpu_linear.pack_weight(weight)
        ways["packed"] = lambda: cpu_linear.linear_packed(x, packed, None)
    return ways


def training_ways(x: Tensor, weight: Tensor) -> dict[str, Callable[[], object]]:
    x.requires_grad_()
    weight.requires_grad_()
    dy = torch.ones(len(x), len(weight), dtype=x.dtype)

    def forward_and_backward(function: Callable[..., Tensor]) -> object:
        return torch.autograd.grad(function(x, weight, None), (x, weight), dy)

    return {
        "torch": lambda: forward_and_backward(F.linear),
        "fp32": lambda: forward_and_backward(cpu_linear.linear_in_fp32),
    }


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def report(title: str, milliseconds: dict[str, float]) -> None:
    figures = [f"{name} {value:.2f}" for name, value in milliseconds.items()]
    print(f"{title:30}{'   '.join(figures)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=2048, help="the weight is width x width")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"bf16 units: {cpu_linear.has_bf16_units()}, {options.threads} threads, CPU ms")
    C = options.width
    for dtype in DTYPES:
        weight = torch.randn(C, C).to(dtype)
        for rows in DECODING_ROWS:
            x = torch.randn(rows, C).to(dtype)
            with torch.inference_mode():
                ways = decoding_ways(x, weight)
                report(
                    f"decoding {name_of(dtype)}, {rows} rows", time_in_turns(ways, options.rounds)
                )
    for dtype in DTYPES[1:]:
        x = torch.randn(TRAINING_ROWS, C).to(dtype)
        weight = torch.randn(C, C).to(dtype)
        ways = training_ways(x, weight)
        report(
            f"training {name_of(dtype)}, {TRAINING_ROWS} rows", time_in_turns(ways, options.rounds)
        )


if __name__ == "__main__":
    main()
