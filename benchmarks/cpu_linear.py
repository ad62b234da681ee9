"""The ways of `ops.cpu_linear` beside torch's own product.

    python benchmarks/cpu_linear.py                    decoding and training, some minutes
    python benchmarks/cpu_linear.py --rounds 3 --width 768
    python benchmarks/cpu_linear.py --token 110m --threads 2

Decoding: x W^T of a few rows without gradients. `torch` is F.linear, `fp32` products of fp32
copies, `packed` the weight in oneDNN's order, `tiles` the weight in tiles of columns (one row).
Training: forward and backward of many rows; `oneDNN` is its product in place of MKL's.
These are CPU milliseconds of one square weight.

`--token SHAPE` multiplies one row with every linear layer of a model of that shape, as decoding one
token does, in wall milliseconds. `read` only sums the weights: nothing can be faster.

A figure is the median over rounds, in which the ways take turns.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama.hf_config import published
from minillama.model import Llama
from minillama.ops import column_tiles, cpu_linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DECODING_ROWS = (1, 2, 3, 4, 6, 8, 16)
TRAINING_ROWS = 512


def time_in_turns(
    ways: dict[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """Way -> median milliseconds of a call: of the CPU, or as another clock says."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):  # the first round warms up
        for name, way in ways.items():
            start = clock()
            way()
            times[name].append((clock() - start) * 1e3)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def decoding_ways(x: Tensor, weight: Tensor) -> dict[str, Callable[[], object]]:
    ways: dict[str, Callable[[], object]] = {"torch": lambda: F.linear(x, weight)}
    if weight.dtype is not torch.float32:
        ways["fp32"] = lambda: cpu_linear.linear_in_fp32(x, weight, None)
    can_pack_bf16 = cpu_linear.has_bf16_units()
    if weight.dtype is torch.float32 or (weight.dtype is torch.bfloat16 and can_pack_bf16):
        packed = cpu_linear.pack_weight(weight)
        ways["packed"] = lambda: cpu_linear.linear_packed(x, packed, None)
    if len(x) == 1 and column_tiles.can_tile(weight):
        tiles = column_tiles.cut(weight)
        ways["tiles"] = lambda: cpu_linear.linear_tiled(x, tiles, None)
    return ways


def training_ways(x: Tensor, weight: Tensor) -> dict[str, Callable[[], object]]:
    x.requires_grad_()
    weight.requires_grad_()
    dy = torch.ones(len(x), len(weight), dtype=x.dtype)

    def forward_and_backward(function: Callable[..., Tensor]) -> object:
        return torch.autograd.grad(function(x, weight, None), (x, weight), dy)

    if weight.dtype is torch.float32:
        other_way, function = "oneDNN", cpu_linear.linear_by_onednn
    else:
        other_way, function = "fp32", cpu_linear.linear_in_fp32
    return {
        "torch": lambda: forward_and_backward(F.linear),
        other_way: lambda: forward_and_backward(function),
    }


def token_ways(shape: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """One row with every linear layer of a model, in each form that the weights can have."""
    model = Llama(published(shape)).initialise(torch.Generator().manual_seed(0)).to(dtype)
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    forms = {"torch": weights, "read": weights}
    if all(map(cpu_linear.packing_gains, weights)):
        forms["packed"] = [cpu_linear.pack_weight(weight) for weight in weights]
    if all(map(column_tiles.can_tile, weights)):
        forms["tiles"] = [column_tiles.cut(weight) for weight in weights]
    rows = {weight.shape[1]: torch.randn(1, weight.shape[1]).to(dtype) for weight in weights}

    def multiply_all(form: str) -> None:
        for weight, stored in zip(weights, forms[form], strict=True):
            if form == "read":
                stored.sum()
            elif form == "torch":
                F.linear(rows[weight.shape[1]], stored)
            else:
                cpu_linear.linear(rows[weight.shape[1]], stored)

    return {form: partial(multiply_all, form) for form in forms}


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
    parser.add_argument("--token", default="", help="a shape: all its linear layers, one row")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = "wall" if options.token else "CPU"
    print(f"bf16 units: {cpu_linear.has_bf16_units()}, {options.threads} threads, {clock} ms")
    if options.token:
        for dtype in DTYPES:
            with torch.inference_mode():
                ways = token_ways(options.token, dtype)
                times = time_in_turns(ways, options.rounds, time.perf_counter)
            report(f"{options.token}, a token in {name_of(dtype)}", times)
        return
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
    for dtype in DTYPES:
        x = torch.randn(TRAINING_ROWS, C).to(dtype)
        weight = torch.randn(C, C).to(dtype)
        ways = training_ways(x, weight)
        report(
            f"training {name_of(dtype)}, {TRAINING_ROWS} rows", time_in_turns(ways, options.rounds)
        )


if __name__ == "__main__":
    main()
