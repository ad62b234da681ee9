"""Each op, forward and backward, in every implementation on this machine: time and memory.

    python benchmarks/ops.py                       all ops at LLaMA's shapes, a quarter of an hour
    python benchmarks/ops.py --ops rms_norm,rope --rounds 3

Forms: `reference` (the formula under autograd), `fused` (backward by hand), `torch` (the builtin:
F.rms_norm, SDPA, F.linear and F.cross_entropy), `chunked` and `by 256` (F.linear_cross_entropy with
its own choice of chunks, and with chunks of 256 rows), `compiled` (torch.compile of the reference);
of AdamW, torch's three. All get the same tensors in fp32; a figure is the median over the rounds,
in which forms take turns, with the smallest and largest; ratios are taken within a round. Time:
CPU seconds, and seconds of the clock. Peak: of a fresh process, over what it held after a
first call. Kept: the bytes of the tensors autograd saves, parameters and inputs (alive anyway)
aside.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillama import ops
from minillama.ops import fused_elementwise, reference

EPS = 1e-5
VOCABULARY = 32000
FORMS = ("reference", "fused", "torch", "chunked", "by 256", "compiled")


@dataclass(frozen=True)
class Measured:
    """An op at one shape.

    `inputs` take gradients, `rest` does not; `builtins` are what torch has for it.
    """

    op: str
    shape: str
    inputs: list[Tensor]
    rest: tuple
    builtins: dict[str, Callable[..., Tensor]]

    def form(self, name: str) -> Callable[..., Tensor] | None:
        if name == "compiled":
            return torch.compile(getattr(reference, self.op), dynamic=False)
        for implementation in ops.TABLE[self.op].implementations:
            if implementation.name == name:
                return implementation.function
        return self.builtins.get(name)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).requires_grad_()


def rms_norm(T: int, C: int) -> Measured:
    return Measured(
        "rms_norm",
        f"{T} x {C}",
        [randn(T, C), randn(C)],
        (EPS,),
        {"torch": lambda x, w, eps: F.rms_norm(x, (C,), w, eps)},
    )


def rope(T: int, C: int) -> Measured:
    D = 64 if C < 2048 else 128
    turned = torch.outer(torch.arange(T), torch.arange(D // 2) / D).unsqueeze(1)
    tables = torch.cat([turned.cos()] * 2, -1), torch.cat((-turned.sin(), turned.sin()), -1)
    return Measured("rope", f"{T} x {C // D} x {D}", [randn(1, T, C // D, D)], tables, {})


def swiglu(T: int, C: int) -> Measured:
    width = {768: 2048, 2048: 5504, 4096: 11008}[C]
    return Measured("swiglu", f"{T} x {width}", [randn(T, width), randn(T, width)], (), {})


def scaled_masked_softmax(T: int, C: int) -> Measured:
    future = torch.ones(T, T, dtype=torch.bool).triu(1)[None, None]
    return Measured(
        "scaled_masked_softmax",
        f"{C // 128} x {T} x {T}",
        [randn(1, C // 128, T, T)],
        (future, 0.125),
        {},
    )


def attention(T: int, C: int) -> Measured:
    D = 64 if C < 2048 else 128

    def builtin(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        ).transpose(1, 2)

    return Measured(
        "attention",
        f"{C // D} heads, {T} x {D}",
        [randn(1, T, C // D, D) for _ in range(3)],
        (),
        {"torch": builtin},
    )


def linear_cross_entropy(T: int, C: int) -> Measured:
    labels = torch.randint(0, VOCABULARY, (T,), generator=torch.Generator().manual_seed(0))
    inputs = [randn(T, C), (randn(VOCABULARY, C).detach() / math.sqrt(C)).requires_grad_()]

    builtins = {
        "torch": lambda h, w, labels: F.cross_entropy(F.linear(h, w), labels, reduction="sum")
    }
    if hasattr(F, "linear_cross_entropy"):  # torch >= 2.13
        for name, options in (
            ("chunked", {}),
            ("by 256", {"batch_chunk_size": 256, "chunking_method": None}),
        ):
            builtins[name] = partial(chunked_builtin, nn.LinearCrossEntropyOptions(**options))
    return Measured(
        "linear_cross_entropy", f"{T} x {C} x {VOCABULARY}", inputs, (labels,), builtins
    )


def chunked_builtin(options: object, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)


OPS: dict[str, Callable[[int, int], Measured]] = {
    "rms_norm": rms_norm,
    "rope": rope,
    "swiglu": swiglu,
    "scaled_masked_softmax": scaled_masked_softmax,
    "attention": attention,
    "linear_cross_entropy": linear_cross_entropy,
}


def run(form: Callable[..., Tensor], measured: Measured, upstream: Tensor) -> None:
    torch.autograd.grad(form(*measured.inputs, *measured.rest), measured.inputs, upstream)


def kept(form: Callable[..., Tensor], measured: Measured) -> int:
    """Bytes of the storages autograd saves that are not inputs."""
    saved: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = form(*measured.inputs, *measured.rest)
    given = {
        x.untyped_storage().data_ptr()
        for x in (*measured.inputs, *measured.rest, y)
        if isinstance(x, Tensor)
    }
    return sum(x.untyped_storage().nbytes() for at, x in saved.items() if at not in given)


def peak(measured: Measured, name: str) -> None:
    """Prints how far this fresh process grows over one forward and backward."""
    form = measured.form(name)
    assert form is not None
    upstream = torch.ones_like(reference_output(measured))
    run(form, measured, upstream)  # what torch takes at a first call is not counted
    Path("/proc/self/clear_refs").write_text("5")  # peak := now
    before = status("VmRSS")
    run(form, measured, upstream)
    print(json.dumps(status("VmHWM") - before))


def reference_output(measured: Measured) -> Tensor:
    """An output's shape and dtype, without computing it."""
    shape = () if measured.op == "linear_cross_entropy" else measured.inputs[0].shape
    return torch.empty(shape)


def status(field: str) -> int:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024


def report(op: str, T: int, C: int, options: argparse.Namespace) -> None:
    """Measure the forms in turns, and print a line for each."""
    measured = OPS[op](T, C)
    forms = {}
    for name in options.forms.split(","):
        form = measured.form(name)
        if form is not None:
            forms[name] = form
    upstream = torch.ones_like(reference_output(measured))
    for form in forms.values():
        run(form, measured, upstream)  # warm-up
    cpu: dict[str, list[float]] = {name: [] for name in forms}  # ms
    wall: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(options.rounds):
        for name, form in forms.items():
            cpu_start = time.process_time()
            wall_start = time.perf_counter()
            for _ in range(options.repeats):
                run(form, measured, upstream)
            cpu[name].append((time.process_time() - cpu_start) / options.repeats * 1e3)
            wall[name].append((time.perf_counter() - wall_start) / options.repeats * 1e3)
    for name, form in forms.items():
        ratios = [a / b for a, b in zip(cpu["reference"], cpu[name], strict=True)]
        is_first = name == "reference"
        peak_mb = peak_of_fresh_process(op, T, C, name, options.threads) / 1e6
        kept_mb = kept(form, measured) / 1e6
        print(
            f"{op if is_first else '':22}{measured.shape if is_first else '':20}{name:10}"
            f"{spread(cpu[name]):>28}{spread(ratios, 2) + ' x':>22}{spread(wall[name]):>30}"
            f"{peak_mb:>9.1f}{kept_mb:>9.1f}",
            flush=True,
        )


def peak_of_fresh_process(op: str, T: int, C: int, form: str, threads: int) -> int:
    """Bytes by which a process grows over one forward and backward (`peak`)."""
    command = [sys.executable, __file__, "--peak", form, "--ops", op]
    command += ["--tokens", str(T), "--widths", str(C), "--threads", str(threads)]
    frees_at_once = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=frees_at_once)
    return json.loads(done.stdout.splitlines()[-1])


def report_adamw(options: argparse.Namespace) -> None:
    """AdamW on a flat vector of 28.3 M fp32 weights, beside torch's three."""
    size = 28_300_000
    kinds = {
        "foreach": {"foreach": True},
        "for-loop": {"foreach": False},
        "torch fused": {"fused": True},
    }
    grad = torch.randn(size)
    steps: dict[str, Callable[[], object]] = {}
    for name, module in (("reference", reference), ("fused", fused_elementwise)):
        state = [torch.zeros(size) for _ in range(3)]
        settings = {
            "learning_rate": 1e-5,
            "beta1": 0.9,
            "beta2": 0.95,
            "epsilon": 1e-8,
            "weight_decay": 0.1,
        }
        steps[name] = lambda m=module, s=state, k=settings: m.adamw(s[0], grad, s[1], s[2], 1, **k)
    for name, kind in kinds.items():
        weight = torch.nn.Parameter(torch.zeros(size))
        weight.grad = grad
        steps[name] = torch.optim.AdamW([weight], lr=1e-5, **kind).step
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds + 1):
        for name, step in steps.items():
            began = time.process_time()
            step()
            found[name].append((time.process_time() - began) * 1e3)
    for name, times in found.items():
        ratios = [a / b for a, b in zip(found["reference"][1:], times[1:], strict=True)]
        print(
            f"{'adamw' if name == 'reference' else '':22}"
            f"{'28.3 M' if name == 'reference' else '':18}{name:12}{spread(times[1:]):>28}"
            f"{spread(ratios, 2) + ' x':>22}"
        )


def spread(values: list[float], digits: int = 1) -> str:
    median = statistics.median(values)
    return f"{median:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", default=",".join([*OPS, "adamw"]))
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--widths", default="768,2048,4096")
    parser.add_argument("--tokens", default="512,2048")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2, help="calls of a form in a round")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="1: CPU time means work, not waiting for the other thread",
    )
    parser.add_argument(
        "--cache_block",
        type=int,
        default=fused_elementwise.CACHE_BLOCK,
        help="elements of a block in RMSNorm and RoPE; a large number: no blocks",
    )
    parser.add_argument("--peak", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    fused_elementwise.CACHE_BLOCK = options.cache_block
    sizes = [(int(T), int(C)) for C in options.widths.split(",") for T in options.tokens.split(",")]
    if options.peak:
        peak(OPS[options.ops](*sizes[0]), options.peak)
        return
    print(
        f"forward + backward, fp32, {options.threads} threads, torch {torch.__version__}; medians "
        f"of {options.rounds} rounds "
        "(smallest–largest)"
    )
    print(
        f"{'op':22}{'shape':20}{'form':10}{'CPU ms':>28}{'faster than formula':>22}{'wall ms':>30}"
        f"{'peak MB':>9}{'kept MB':>9}"
    )
    for op in options.ops.split(","):
        if op == "adamw":
            report_adamw(options)
            continue
        for T, C in sizes:
            report(op, T, C, options)


if __name__ == "__main__":
    main()
