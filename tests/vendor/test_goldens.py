"""Our emulation of Ascend's kernels beside Huawei's golden functions.

Huawei's tools compare results of the chip with these.

They are in the wheel of mindstudio-probe (MulanPSL-2.0), which is neither installed nor copied
here: MINILLAMA_MSPROBE names a folder into which it was unpacked, and the tests skip without it
(CONTRIBUTING.md has the two commands).
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.vendor import ascend

FOLDER = (
    Path(os.environ.get("MINILLAMA_MSPROBE", "absent")) / "msprobe" / "pytorch" / "bench_functions"
)
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="MINILLAMA_MSPROBE names no folder with mindstudio-probe unpacked"
)


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    ascend.install()


def golden(file: str) -> ModuleType:
    """One file of the wheel, without the package around it."""
    spec = importlib.util.spec_from_file_location(f"golden_{file}", FOLDER / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(ours: Tensor, theirs: Tensor) -> bool:
    return float((ours.detach().double() - theirs.detach().double()).norm()) <= 1e-6 * float(
        theirs.detach().double().norm()
    )


def gradients(
    kernel: Callable, *inputs: Tensor, upstream: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    y = kernel(*inputs)
    return y, torch.autograd.grad(y, inputs, upstream)


def test_rms_norm() -> None:
    theirs, x, w, dy = (
        golden("rms_norm"),
        1e-2 * randn(6, 33),
        randn(33, seed=1),
        randn(6, 33, seed=2),
    )
    y, (dx, dw) = gradients(
        lambda x, w: torch.ops.npu.npu_rms_norm(x, w, 1e-5)[0], x, w, upstream=dy
    )
    right, rstd = theirs.npu_rms_norm(x, w, 1e-5)
    right_dx, right_dw = theirs.npu_rms_norm_backward(dy, x, w, rstd)
    assert near(y, right)
    assert near(dx, right_dx)
    assert near(dw, right_dw.sum(0))


def test_rotary_mul() -> None:
    theirs, x, dy, cos, sin = (
        golden("rotary_mul"),
        *(randn(*shape, 8, seed=i) for i, shape in enumerate([(2, 5, 3)] * 2 + [(1, 5, 1)] * 2)),
    )
    y, (dx,) = gradients(lambda x: torch.ops.npu.npu_rotary_mul(x, cos, sin), x, upstream=dy)
    assert near(y, theirs.npu_rotary_mul(x, cos, sin))
    assert near(dx, theirs.npu_rotary_mul_backward(dy, x.clone(), cos.clone(), sin.clone())[0])


def test_swiglu() -> None:
    theirs, x, dy = golden("swiglu"), randn(4, 22), randn(4, 11, seed=1)
    y, (dx,) = gradients(lambda x: torch.ops.npu.npu_swiglu(x, -1), x, upstream=dy)
    assert near(y, theirs.npu_swiglu(x))
    assert near(dx, theirs.npu_swiglu_backward(dy, x))


def test_scaled_masked_softmax() -> None:
    theirs, x, mask = (
        golden("scaled_mask_softmax"),
        randn(2, 3, 32, 64),
        torch.ones(2, 3, 32, 64, dtype=torch.bool).triu(33),
    )
    dy = randn(2, 3, 32, 64, seed=1)
    y, (dx,) = gradients(
        lambda x: torch.ops.npu.npu_scaled_masked_softmax(x, mask, 0.3, False), x, upstream=dy
    )
    assert near(y, theirs.npu_scaled_masked_softmax(x, mask, 0.3, False))
    assert near(dx, theirs.npu_scaled_masked_softmax_backward(dy, y, mask, 0.3, False))


@pytest.mark.parametrize("step", [1, 2, 9])
def test_adamw(step: int) -> None:
    var, m, v, grad = randn(30), randn(30, seed=1), randn(30, seed=2).square(), randn(30, seed=3)
    numbers = (
        0.9 ** (step - 1),
        0.95 ** (step - 1),
        1e-2,
        0.1,
        0.9,
        0.95,
        1e-6,
        grad,
        None,
        False,
        False,
    )
    right = golden("apply_adam_w").npu_apply_adam_w(
        *numbers, out=(var.clone(), m.clone(), v.clone())
    )
    torch.ops.npu.npu_apply_adam_w.out(*numbers, out=[var, m, v])
    assert all(near(a, b) for a, b in zip((var, m, v), right, strict=True))


def test_fusion_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("einops")
    for name in (
        "msprobe",
        "msprobe.pytorch",
        "msprobe.pytorch.common",
        "msprobe.pytorch.common.utils",
        "msprobe.core",
        "msprobe.core.common",
        "msprobe.core.common.const",
    ):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["msprobe.pytorch.common.utils"].logger = None
    sys.modules["msprobe.core.common.const"].Const = sys.modules[
        "msprobe.core.common.const"
    ].CompareConst = None
    theirs = golden("npu_fusion_attention")
    q, k, v, dy = (randn(2, 9, 4, 16, seed=i) for i in range(4))  # BSND
    triangle, hidden = torch.ones(2048, 2048, dtype=torch.bool).triu(1), torch.ones(9, 9).triu(1)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.npu.npu_fusion_attention(
            q, k, v, 4, "BSND", atten_mask=triangle, scale=0.25, sparse_mode=3
        )[0]

    y, found = gradients(call, q, k, v, upstream=dy)
    bnsd = [x.transpose(1, 2) for x in (q, k, v)]
    right, maximum, total = theirs.fusion_attention_forward(
        theirs.FaForwardParams(*bnsd, None, hidden, None, 0.25, 1.0)
    )
    weights = theirs.softmax_forward(theirs.calculate_qk(*bnsd[:2], hidden, None, 0.25))[0]
    backward = theirs.fusion_attention_backward(
        theirs.FaBackwardParams(dy.transpose(1, 2), *bnsd, weights, None, None, 0.25, 1.0)
    )
    assert near(y, right.transpose(1, 2))
    assert all(near(a, b.transpose(1, 2)) for a, b in zip(found, backward, strict=True))
    assert maximum.shape == total.shape
