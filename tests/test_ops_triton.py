"""Triton's kernels without a GPU: in its interpreter, and compiled for sm_80 and sm_90.

An optional leg, skipped where Triton is not installed; CONTRIBUTING.md has its command. It cannot
show speed, nor what only real threads do. The interpreter is chosen before Triton is imported, so
compiling happens in a process of its own.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from minillama.ops import cuda
from tests.parity import BOUNDS, Case, cells, check, randn

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed: pip install 'minillama[triton]'"
)

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from minillama.ops import triton as ours

TYPES = {"eps": "fp32", "r": "*fp32", "partial": "*fp32", "BLOCK": "constexpr"}
TYPES |= {"N": "i32", "C": "i32", "rows": "i32"}
KERNELS = (ours._rms_norm_forward, ours._rms_norm_backward)
KERNELS += (ours._swiglu_forward, ours._swiglu_backward)
for kernel in KERNELS:
    for data in ("*fp32", "*bf16", "*fp16"):
        signature = {name: TYPES.get(name, data) for name in kernel.arg_names}
        block = {(kernel.arg_names.index("BLOCK"),): 4096}
        source = ASTSource(kernel, signature=signature, constexprs=block)
        for capability in (80, 90):
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm
            assert compiled["cubin"] and f".target sm_{capability}" in compiled["ptx"]
            print(kernel.__name__, data, capability)
"""


CELLS = [
    pytest.param(op, case, id=f"{op}-{case.name}")
    for op in ("rms_norm", "swiglu")
    for case in cells(op)
]


@pytest.fixture(scope="module")
def kernels():
    """`ops.triton` in the interpreter."""
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip(
            "Triton was imported before its interpreter could be chosen: run this file alone"
        )
    os.environ["TRITON_INTERPRET"] = "1"
    from minillama.ops import triton

    return triton


@needs_triton
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("op", "case"), CELLS)
def test_a_kernel_is_its_formula_forward_and_backward(
    kernels, op: str, case: Case, dtype: torch.dtype, strided: bool
) -> None:
    check(op, case, getattr(cuda, op), dtype, strided)


@needs_triton
@pytest.mark.parametrize("programs", [1, 4, 33])
def test_any_number_of_programs_share_the_gradient_of_a_norms_weight(
    kernels, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """33 rows over 4 programs: the last one has rows that do not exist."""
    monkeypatch.setattr(kernels, "PARTIAL_SUMS", programs)
    check("rms_norm", cells("rms_norm")[0], cuda.rms_norm, torch.float32, strided=False)


@needs_triton
def test_every_kernel_compiles_for_the_two_architectures(tmp_path: Path) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
    } | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4 * 3 * 2


def test_what_a_kernel_does_not_support_is_left_to_the_next_implementation() -> None:
    x, weight = randn(3, 8, seed=0), randn(8, seed=1)
    assert cuda.supports_rms_norm(x, weight, 1e-5)
    assert not cuda.supports_rms_norm(x.bfloat16(), weight, 1e-5)
    assert not cuda.supports_rms_norm(x.double(), weight.double(), 1e-5)
    assert not cuda.supports_rms_norm(x[:0], weight, 1e-5)
    assert not cuda.supports_rms_norm(torch.empty(1, 1 << 15), torch.empty(1 << 15), 1e-5)
    assert cuda.supports_swiglu(x, x)
    assert not cuda.supports_swiglu(x, x.bfloat16())
    assert not cuda.supports_swiglu(x, x[:1])


@pytest.mark.parametrize(("block", "warps"), [(64, 4), (1024, 4), (4096, 16), (1 << 14, 32)])
@needs_triton
def test_a_wide_row_is_shared_by_more_warps(kernels, block: int, warps: int) -> None:
    assert kernels.warps_for(block) == warps


@pytest.mark.parametrize("missing", ["a C compiler", "Python's header files"])
def test_triton_without_what_it_compiles_with_is_not_used(
    missing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It compiles the launcher of a kernel at the first call, in the middle of a run."""
    monkeypatch.setattr(cuda, "find_spec", lambda name: name)
    monkeypatch.setattr(cuda.shutil, "which", lambda name: missing != "a C compiler")
    if missing != "a C compiler":
        monkeypatch.setattr(cuda.sysconfig, "get_path", lambda name: "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    cuda.has_triton.cache_clear()
    assert not cuda.has_triton()
    assert missing in caplog.text
    cuda.has_triton.cache_clear()


def test_triton_is_not_imported_until_a_kernel_is_called() -> None:
    program = (
        "import sys; from minillama.ops import cuda; "
        "print('triton' in sys.modules, cuda.has_triton())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stdout.split() == ["False", str(find_spec("triton") is not None)]
