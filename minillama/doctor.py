"""`python -m minillama.doctor`: what this machine has, and whether it computes what it should.

A small model with known weights goes forward and backward on the chosen device and, by the plain formulas, on the processor; then
each op alone: the form in use, its error against the formula on the processor, and what it costs beside the formula on the same device.
Errors are relative to the norm of the right answer, the worst of the output and every gradient. Ends with 1 where an answer is wrong.
"""

import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minillama import cli, ops, train_config
from minillama import device as devices
from minillama.llama_config import LlamaConfig
from minillama.model import Llama

PACKAGES = ("torch", "torch_npu", "torch_mlu", "torch_mlu_ops", "torch_tpu", "triton")
VARIABLES = (
    "MINILLAMA_DEVICE",
    "MINILLAMA_OPS",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "USE_SOPHGO",
    "CHIPS",
    "CHIP_MAP",
    "SOPHGO_SPLIT",
    "ASCEND_RT_VISIBLE_DEVICES",
    "MLU_VISIBLE_DEVICES",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)
LIMITS = {
    torch.float32: 1e-4,
    torch.bfloat16: 2e-2,
    torch.float16: 5e-3,
}  # wide for another order of addition, not for another formula
TINY = LlamaConfig(
    dim=128,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    ffn_dim=256,
    vocab_size=512,
    max_seq_len=256,
    norm_eps=1e-5,
    rope_theta=10000.0,
)


@dataclass(frozen=True)
class Case:
    """An op on small inputs of LLaMA's shapes. call(op, *inputs) returns what the op does, or the first input where it returns nothing."""

    name: str  # the op's, and what is special after a comma
    inputs: tuple[Tensor, ...]  # on the host
    call: Callable[..., Any] = lambda op, *inputs: op(*inputs)
    trains: bool = True  # with backward


def cases(dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """dtype: what the inputs, which are fp32, are rounded to."""
    (T, C, H, K, D, F, V), generator = (
        (128, 256, 8, 2, 64, 512, 1000),
        torch.Generator().manual_seed(0),
    )

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype).float()

    cos, sin = ops.rope_tables(replace(TINY, head_dim=D), T)
    labels = (torch.arange(T) * 7 % V).where(torch.arange(T) % 3 > 0, torch.tensor(ops.IGNORE))
    q, k, v = randn(1, T, H, D), randn(1, T, K, D), randn(1, T, K, D)
    adam = {
        "learning_rate": 1e-2,
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-8,
        "weight_decay": 0.1,
    }
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    yield Case(
        "rms_norm", (randn(1, T, C, scale=1e-3), randn(C)), lambda op, x, w: op(x, w, 1e-5)
    )  # epsilon matters
    yield Case("rope", (q,), lambda op, x: op(x, cos.to(x.device), sin.to(x.device)))
    yield Case("swiglu", (randn(1, T, F), randn(1, T, F)))
    yield Case(
        "scaled_masked_softmax", (randn(1, H, T, T),), lambda op, x: op(x, mask.to(x.device), 0.125)
    )
    yield Case("linear", (randn(1, T, C), randn(F, C)))
    yield Case("attention", (q, k, v))
    yield Case(
        "attention, packed",
        (q, k, v),
        lambda op, q, *kv: op(q, *kv, ops.Documents([70, 3, 55], q.device)),
    )
    yield Case("attention, cached", (q[:, :3], k, v), trains=False)
    yield Case("attention, one query", (q[:, :1], k, v), trains=False)
    yield Case(
        "linear_cross_entropy",
        (randn(T, C), randn(V, C)),
        lambda op, h, w: op(h, w, labels.to(h.device)),
    )
    yield Case(
        "adamw",
        (randn(V), randn(V), randn(V), randn(V).abs()),
        lambda op, w, g, m, v: op(w, g, m, v, 3, **adam) or w,
        trains=False,
    )


def solve(
    case: Case, function: Callable, device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], float, int]:
    """Run a case with `function` in place of its op: (output and gradients on the host, seconds of the fastest of four, bytes kept)."""
    fastest, kept = math.inf, {}
    for _ in range(4):
        inputs = [x.to(device, dtype, copy=True).requires_grad_(case.trains) for x in case.inputs]
        devices.synchronize(device)
        began = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.update({x.data_ptr(): x.nbytes}) or x, lambda x: x
        ):
            kept.clear()
            y = case.call(function, *inputs)
            if case.trains:
                y.backward(torch.arange(y.numel()).cos().view(y.shape).to(device, y.dtype))
        devices.synchronize(device)
        fastest = min(fastest, time.perf_counter() - began)
    return (
        [value.detach().cpu().float() for value in (y, *(x.grad for x in inputs if case.trains))],
        fastest,
        sum(kept.values()),
    )


def error(found: list[Tensor], right: list[Tensor]) -> float:
    """The largest relative error among tensors, by norm."""
    return max(
        float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(found, right, strict=True)
    )


def model_answer(
    device: torch.device, dtype: torch.dtype, rounded: torch.dtype, spec: str
) -> list[Tensor]:
    """Loss and gradients of a model with known weights, rounded to `rounded`, by the forms that `spec` names."""
    ops.choose(spec)
    model = Llama(TINY).initialise(torch.Generator().manual_seed(1)).to(rounded).to(device, dtype)
    tokens = (torch.arange(192) ** 2 % TINY.vocab_size)[None].to(device)
    loss = model.loss_sum(tokens, tokens.roll(-1), ops.Documents([100, 60, 32], device)) / 192
    loss.backward()
    return [x.detach().cpu().float() for x in (loss, *(p.grad for p in model.parameters()))]


def describe() -> None:
    """Print what is here before any of it is used."""
    installed = {
        distribution.metadata["Name"].replace("-", "_"): distribution.version
        for distribution in metadata.distributions()
    }
    here = {
        name: installed[name] + " (Google's)" * devices.is_googles(name)
        for name in PACKAGES
        if name in installed
    }
    print(
        f"python {platform.python_version()} on {platform.machine()}; "
        + ", ".join(map(" ".join, here.items()))
        + "; not here: "
        + ", ".join(name for name in PACKAGES if name not in here)
    )
    print(
        "variables: "
        + (
            ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
            or "none that matter"
        )
    )


def main(arguments: list[str]) -> int:
    parser = cli.Parser(
        prog="minillama.doctor",
        description=__doc__,
        usage="python -m minillama.doctor [--device NAME] [--dtype NAME]",
    )
    parser.add_argument("--device", default="auto", choices=train_config.DEVICES, help="[auto]")
    parser.add_argument(
        "--dtype", default="float32", choices=tuple(train_config.PRECISIONS), help="[float32]"
    )
    parser.add_argument(
        "--ops", default="", metavar="FORM", help="forms of the ops, as MINILLAMA_OPS"
    )
    options = parser.parse_args(arguments)
    describe()
    device = devices.pick(options.device)
    dtype, warning = devices.compute_dtype(options.dtype, device)
    memory, limit = devices.memory(device), LIMITS[dtype]
    print(
        f"device: {device}, collectives {dist.get_default_backend_for_device(device)}, "
        f"bf16 {'yes' if devices.supports_bf16(device) else 'no'}, "
        f"free {'not told' if memory.free is None else f'{memory.free / 1e9:.1f} GB'}"
        + f"; {warning}"
        * bool(warning)
    )
    right = model_answer(torch.device("cpu"), torch.float32, dtype, "reference")
    loss, wrong = float(right[0]), error(model_answer(device, dtype, dtype, options.ops), right)
    failed = [] if wrong <= limit else ["the model"]
    print(
        f"a model, forward and backward, {str(dtype)[6:]}: loss {loss:.6f}, error {wrong:.1e} ({'ok' if wrong <= limit else 'WRONG'})\n"
    )
    print(
        f"{'op':22}{'form':11}{'error':>8}{'':7}{'ms':>8}{'formula':>9}{'kept kB':>9}{'formula':>9}"
    )
    for case in cases(dtype):
        name = case.name.partition(",")[0]
        op, formula = ops.TABLE[name], getattr(ops.reference, name)
        right, _, _ = solve(case, formula, torch.device("cpu"), torch.float32)
        found, seconds, kept = solve(case, op, device, dtype)
        _, plain_seconds, plain_kept = solve(case, formula, device, dtype)
        form = case.call(
            op.pick,
            *(x.to(device, dtype, copy=True).requires_grad_(case.trains) for x in case.inputs),
        )
        wrong = error(found, right)
        failed += [] if wrong <= limit else [case.name]
        print(
            f"{case.name:22}{form.name:11}{wrong:8.1e}  {'ok' if wrong <= limit else 'WRONG':5}{1e3 * seconds:8.2f}"
            f"{1e3 * plain_seconds:9.2f}{kept / 1e3:9.1f}{plain_kept / 1e3:9.1f}"
        )
    print(
        f"\n{'wrong: ' + ', '.join(failed) if failed else 'every answer is right'} (limit {limit:g})"
    )
    return int(bool(failed))


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
