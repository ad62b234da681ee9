"""Our calls of Ascend's kernels, by the true schemas of torch_npu 2.13.0. No chip is involved.

They are compared with emulations written from the manual (`ascend.py`). `test_npu_mistakes.py`
makes the same comparisons with calls that are deliberately wrong.
"""

from collections.abc import Callable

import pytest
import torch

from minillama.ops import Documents, npu
from tests.vendor import ascend
from tests.vendor.npu_checks import (
    BOUNDS,
    EPS,
    check_adamw,
    check_attention,
    check_inference,
    check_rms_norm,
    check_rope,
    check_softmax,
    check_swiglu,
)

F16 = torch.float16
each_dtype = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    ascend.install()


@pytest.fixture(autouse=True)
def no_calls_yet() -> None:
    ascend.CALLS.clear()


@each_dtype
def test_rms_norm_is_its_formula(dtype: torch.dtype) -> None:
    check_rms_norm(npu.rms_norm, dtype)
    assert set(ascend.CALLS) == {"npu_rms_norm"}


@each_dtype
def test_rope_is_its_formula_with_tables_for_all_rows_or_for_each(dtype: torch.dtype) -> None:
    check_rope(npu.rope, dtype)
    assert set(ascend.CALLS) == {"npu_rotary_mul"}


@each_dtype
def test_swiglu_is_its_formula(dtype: torch.dtype) -> None:
    check_swiglu(npu.swiglu, dtype)


@each_dtype
def test_the_scaled_masked_softmax_is_its_formula(dtype: torch.dtype) -> None:
    check_softmax(npu.scaled_masked_softmax, dtype)


@each_dtype
def test_attention_is_its_formula_in_training_with_shared_heads_and_packed_documents(
    dtype: torch.dtype,
) -> None:
    check_attention(npu.attention, dtype)
    assert set(ascend.CALLS) == {"npu_fusion_attention"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_is_its_formula_over_a_cache(dtype: torch.dtype) -> None:
    check_inference(npu.attention, dtype)
    assert set(ascend.CALLS) == {"npu_prompt_flash_attention", "npu_incre_flash_attention"}


def test_adamw_is_its_formula() -> None:
    check_adamw(npu.adamw)


@pytest.mark.parametrize(
    ("guard", "arguments"),
    [
        (npu.supports_rms_norm, (torch.zeros(2, 4), torch.zeros(4, dtype=F16), EPS)),
        (npu.supports_rms_norm, (torch.zeros(4), torch.zeros(4), EPS)),
        (npu.supports_rms_norm, (torch.zeros(2, 4).double(), torch.zeros(4).double(), EPS)),
        (npu.supports_rope, (torch.zeros(1, 2, 1, 896), torch.zeros(2, 448), torch.zeros(2, 448))),
        (npu.supports_rope, (torch.zeros(1000, 1, 1, 4), torch.zeros(1, 2), torch.zeros(1, 2))),
        (npu.supports_swiglu, (torch.zeros(2, 4), torch.zeros(2, 4, dtype=F16))),
        *[
            (
                npu.supports_scaled_masked_softmax,
                (torch.zeros(1, 1, *sides), torch.zeros(sides, dtype=torch.bool), 1.0),
            )
            for sides in ((1, 64), (64, 33), (16, 32), (32, 4128))
        ],
        (
            npu.supports_attention,
            (torch.zeros(1, 4, 6, 8), torch.zeros(1, 4, 4, 8), torch.zeros(1, 4, 4, 8)),
        ),
        (
            npu.supports_attention,
            (torch.zeros(1, 4, 6, 8), torch.zeros(1, 4, 6, 8), torch.zeros(1, 4, 6, 8)),
        ),  # fp32 without a gradient
        (
            npu.supports_attention,
            (torch.zeros(1, 1, 6, 24, dtype=F16),) * 3,
        ),  # a head size that is not a multiple of 32 bytes
        (
            npu.supports_attention,
            (torch.zeros(2, 1, 6, 16, dtype=F16),) * 3 + (None, torch.tensor([1, 1])),
        ),  # rows of their own lengths
        (npu.supports_attention, (torch.zeros(1, 1025, 2, 8),) * 3 + (Documents([1] * 1025),)),
        (npu.supports_attention, (torch.zeros(1, 4, 257, 8, requires_grad=True),) * 3),
        (
            npu.supports_adamw,
            (torch.zeros(3), torch.zeros(3, dtype=F16), torch.zeros(3), torch.zeros(3), 1),
        ),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_the_manual_excludes_is_left_to_another_implementation(
    guard: Callable, arguments: tuple
) -> None:
    assert not guard(*arguments)
