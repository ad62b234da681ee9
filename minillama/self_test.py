"""The checks of the doctor: a model and every op, against the reference formulas on the CPU.

A small model with known weights runs forward and backward on the chosen device, and with the
reference formulas on the CPU. Then each op runs alone. A row of the table shows the implementation
in use, its error against the reference on the CPU, and its time and kept memory beside those of the
reference on the same device. An error is relative to the norm of the right result; the worst of the
output and all gradients counts."""

import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minillama import device as devices
from minillama import ops
from minillama.llama_config import LlamaConfig
from minillama.memory import device_memory
from minillama.model import Llama
from minillama.threads import WAITING

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
    *WAITING,
)
# The largest relative error: another order of addition stays below it, another formula does not.
LIMITS = {
    torch.float32: 1e-4,
    torch.bfloat16: 2e-2,
    torch.float16: 5e-3,
}
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
    """An op on small inputs of LLaMA's shapes.

    `call(function, *inputs)` calls `function` as the op is called and returns its result, or the
    first input if it returns None.
    """

    name: str  # the op's, and what is special after a comma
    inputs: tuple[Tensor, ...]  # on the host
    call: Callable[..., Any] = lambda op, *inputs: op(*inputs)
    trains: bool = True  # with backward

    @property
    def op(self) -> str:
        return self.name.partition(",")[0]

    def inputs_on(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Copies of the inputs on a device."""
        copies = [x.to(device, dtype, copy=True) for x in self.inputs]
        return [x.requires_grad_(self.trains) for x in copies]


def cases(dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """The cases of all ops. Their inputs are fp32, rounded to `dtype`."""
    T, C, H, K, D, F, V = 128, 256, 8, 2, 64, 512, 1000
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype).float()

    cos, sin = ops.rope_tables(replace(TINY, head_dim=D), T)
    positions = torch.arange(T)
    labels = (positions * 7 % V).where(positions % 3 > 0, torch.tensor(ops.IGNORE))
    q = randn(1, T, H, D)
    k = randn(1, T, K, D)
    v = randn(1, T, K, D)
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)

    def rms_norm(op: Callable, x: Tensor, weight: Tensor) -> Tensor:
        return op(x, weight, 1e-5)

    def rope(op: Callable, x: Tensor) -> Tensor:
        return op(x, cos.to(x.device), sin.to(x.device))

    def softmax(op: Callable, scores: Tensor) -> Tensor:
        return op(scores, mask.to(scores.device), 0.125)

    def packed_attention(op: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return op(q, k, v, ops.Documents([70, 3, 55], q.device))

    def loss(op: Callable, hidden: Tensor, weight: Tensor) -> Tensor:
        return op(hidden, weight, labels.to(hidden.device))

    def adamw(op: Callable, weight: Tensor, gradient: Tensor, m: Tensor, v: Tensor) -> Any:
        constants = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.1}
        result = op(weight, gradient, m, v, 3, learning_rate=1e-2, **constants)
        return weight if result is None else result  # the op works in place

    small = randn(1, T, C, scale=1e-3)  # so small that epsilon matters
    yield Case("rms_norm", (small, randn(C)), rms_norm)
    yield Case("rope", (q,), rope)
    yield Case("swiglu", (randn(1, T, F), randn(1, T, F)))
    yield Case("scaled_masked_softmax", (randn(1, H, T, T),), softmax)
    yield Case("linear", (randn(1, T, C), randn(F, C)))
    yield Case("attention", (q, k, v))
    yield Case("attention, packed", (q, k, v), packed_attention)
    yield Case("attention, cached", (q[:, :3], k, v), trains=False)
    yield Case("attention, one query", (q[:, :1], k, v), trains=False)
    yield Case("linear_cross_entropy", (randn(T, C), randn(V, C)), loss)
    adam_state = (randn(V), randn(V), randn(V), randn(V).abs())
    yield Case("adamw", adam_state, adamw, trains=False)


class Solution(NamedTuple):
    """What came of a case."""

    tensors: list[Tensor]  # output and gradients, on the host
    seconds: float  # of the fastest of four runs
    bytes_kept: int  # for backward


def solve(case: Case, function: Callable, device: torch.device, dtype: torch.dtype) -> Solution:
    """Run a case with `function` in place of its op."""
    fastest = math.inf
    for _ in range(4):
        inputs = case.inputs_on(device, dtype)
        kept: dict[int, int] = {}  # address -> bytes

        def keep(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.data_ptr()] = x.nbytes
            return x

        devices.synchronize(device)
        started = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            output = case.call(function, *inputs)
            if case.trains:
                gradient = torch.arange(output.numel()).cos().view(output.shape)
                output.backward(gradient.to(device, output.dtype))
        devices.synchronize(device)
        fastest = min(fastest, time.perf_counter() - started)
    results = [output]
    if case.trains:
        results += [x.grad for x in inputs if x.grad is not None]
    on_host = [result.detach().cpu().float() for result in results]
    return Solution(on_host, fastest, sum(kept.values()))


def relative_error(tensors: list[Tensor], right: list[Tensor]) -> float:
    """The largest relative error among tensors, by norm."""
    errors = []
    for a, b in zip(tensors, right, strict=True):
        errors.append(float((a - b).norm() / b.norm().clamp(min=1e-30)))
    return max(errors)


def solve_model(
    device: torch.device, dtype: torch.dtype, rounded: torch.dtype, spec: str
) -> list[Tensor]:
    """Loss and gradients of a model with known weights.

    Args:
        rounded: the dtype that the weights are rounded to first.
        spec: the implementations of the ops, as `ops.choose` takes them.
    """
    ops.choose(spec)
    model = Llama(TINY).initialise(torch.Generator().manual_seed(1))
    model = model.to(rounded).to(device, dtype)
    tokens = (torch.arange(192) ** 2 % TINY.vocab_size)[None].to(device)
    documents = ops.Documents([100, 60, 32], device)
    loss = model.loss_sum(tokens, tokens.roll(-1), documents) / 192
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [x.detach().cpu().float() for x in (loss, *gradients)]


def describe_machine() -> None:
    """Print what is installed, before any of it is used."""
    installed = {}
    for distribution in metadata.distributions():
        installed[distribution.metadata["Name"].replace("-", "_")] = distribution.version
    present = []
    missing = []
    for name in PACKAGES:
        if name not in installed:
            missing.append(name)
            continue
        note = " (Google's)" if devices.is_googles(name) else ""
        present.append(f"{name} {installed[name]}{note}")
    print(
        f"python {platform.python_version()} on {platform.machine()}; {', '.join(present)}; "
        f"not here: {', '.join(missing)}"
    )
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    print(f"variables: {', '.join(variables) or 'none that matter'}")


def describe_device(device: torch.device, warning: str) -> None:
    """Print what is known about the device."""
    free = device_memory(device).free
    bf16 = "yes" if devices.supports_bf16(device) else "no"
    line = (
        f"device: {device}, collectives {dist.get_default_backend_for_device(device)}, "
        f"bf16 {bf16}, free {'unknown' if free is None else f'{free / 1e9:.1f} GB'}"
    )
    print(f"{line}; {warning}" if warning else line)


def check_model(device: torch.device, dtype: torch.dtype, spec: str) -> bool:
    """Print the model's line; whether it is right."""
    right = solve_model(torch.device("cpu"), torch.float32, dtype, "reference")
    error = relative_error(solve_model(device, dtype, dtype, spec), right)
    is_right = error <= LIMITS[dtype]
    name = str(dtype).removeprefix("torch.")
    print(
        f"a model, forward and backward, {name}: loss {float(right[0]):.6f}, "
        f"error {error:.1e} ({'ok' if is_right else 'WRONG'})\n"
    )
    return is_right


def check_op(case: Case, device: torch.device, dtype: torch.dtype) -> bool:
    """Print an op's row of the table; whether it is right."""
    op = ops.TABLE[case.op]
    reference = getattr(ops.reference, case.op)
    right = solve(case, reference, torch.device("cpu"), torch.float32)
    result = solve(case, op, device, dtype)
    plain = solve(case, reference, device, dtype)
    chosen = case.call(op.select, *case.inputs_on(device, dtype))
    error = relative_error(result.tensors, right.tensors)
    is_right = error <= LIMITS[dtype]
    print(
        f"{case.name:22}{chosen.name:11}{error:8.1e}  {'ok' if is_right else 'WRONG':5}"
        f"{1e3 * result.seconds:8.2f}{1e3 * plain.seconds:11.2f}"
        f"{result.bytes_kept / 1e3:9.1f}{plain.bytes_kept / 1e3:11.1f}"
    )
    return is_right


def run(device_name: str, dtype_name: str, spec: str) -> int:
    """Print the report. Returns the exit code: 1 if a result is wrong.

    spec: the implementations of the ops, as `ops.choose` takes them.
    """
    describe_machine()
    device = devices.pick(device_name)
    dtype, warning = devices.compute_dtype(dtype_name, device)
    describe_device(device, warning)
    wrong = []
    if not check_model(device, dtype, spec):
        wrong.append("the model")
    print(
        f"{'op':22}{'uses':11}{'error':>8}{'':7}"
        f"{'ms':>8}{'reference':>11}{'kept kB':>9}{'reference':>11}"
    )
    for case in cases(dtype):
        if not check_op(case, device, dtype):
            wrong.append(case.name)
    verdict = f"wrong: {', '.join(wrong)}" if wrong else "every answer is right"
    print(f"\n{verdict} (limit {LIMITS[dtype]:g})")
    return 1 if wrong else 0
