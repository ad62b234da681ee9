"""Wrong calls of Ascend's kernels: the comparisons of `npu_checks` must catch each of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minillama.ops import Documents
from tests.vendor import ascend
from tests.vendor.npu_checks import (
    check_adamw,
    check_attention,
    check_inference,
    check_rms_norm,
    check_rope,
    check_softmax,
    check_swiglu,
)


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    ascend.install()


def kernel(name: str) -> Callable:
    return getattr(torch.ops.npu, name)


TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def wide(t: Tensor, x: Tensor) -> Tensor:
    """A table as the kernel wants it: 4 dimensions, and no sign on the sine's first half."""
    return torch.cat([t[..., t.shape[-1] // 2 :]] * 2, -1).view(-1, x.shape[1], 1, x.shape[-1])


def train(q: Tensor, k: Tensor, v: Tensor, d: Documents | None = None, **changes: object) -> Tensor:
    """The right call of the training kernel, with changes."""
    shape, ends = (
        q.shape,
        None if d is None else [sum(d.lengths[: i + 1]) for i in range(len(d.lengths))],
    )
    layout = "BSND" if d is None else "TND"
    if d is not None:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    right = {
        "scale": shape[-1] ** -0.5,
        "atten_mask": TRIANGLE,
        "sparse_mode": 3,
        "actual_seq_qlen": ends,
        "actual_seq_kvlen": ends,
    }
    arguments = {name: value for name, value in (right | changes).items() if value is not None}
    return kernel("npu_fusion_attention")(
        q, k, v, arguments.pop("head_num", shape[2]), layout, **arguments
    )[0].view(shape)


def infer(q: Tensor, k: Tensor, v: Tensor, copy: bool = True, **changes: object) -> Tensor:
    """The right call of the kernel for prompts, or of that for a single query, with changes."""
    k, v = (x.contiguous() if copy else x for x in (k, v))
    right = {
        "num_heads": q.shape[2],
        "num_key_value_heads": k.shape[2],
        "input_layout": "BSND",
        "scale_value": q.shape[-1] ** -0.5,
    }
    right |= {} if q.shape[1] == 1 else {"atten_mask": TRIANGLE, "sparse_mode": 3}
    arguments = {name: value for name, value in (right | changes).items() if value is not None}
    return kernel("npu_incre_flash_attention" if q.shape[1] == 1 else "npu_prompt_flash_attention")(
        q, k, v, **arguments
    )


def adam(
    weight: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    power: int,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    **out: object,
) -> None:
    out = out or {"out": [weight, first, second]}
    kernel("npu_apply_adam_w").out(
        beta1**power,
        beta2**power,
        learning_rate,
        weight_decay,
        beta1,
        beta2,
        epsilon,
        grad,
        None,
        False,
        False,
        **out,
    )


RIGHT = [
    (check_attention, train),
    (check_inference, infer),
    (check_adamw, lambda w, g, m, v, t, **s: adam(w, g, m, v, t - 1, **s)),
]


WRONG: dict[str, tuple[Callable, Callable]] = {
    "epsilon left at the kernel's default": (
        check_rms_norm,
        lambda x, w, eps: kernel("npu_rms_norm")(x, w)[0],
    ),
    "rstd taken for y": (
        check_rms_norm,
        lambda x, w, eps: kernel("npu_rms_norm")(x, w, epsilon=eps)[1],
    ),
    "eps for epsilon": (check_rms_norm, lambda x, w, eps: kernel("npu_rms_norm")(x, w, eps=eps)[0]),
    "a weight of another dtype": (
        lambda call: check_rms_norm(call, torch.bfloat16),
        lambda x, w, eps: kernel("npu_rms_norm")(x, w.float(), epsilon=eps)[0],
    ),
    "cos and sin swapped": (
        check_rope,
        lambda x, c, s: kernel("npu_rotary_mul")(x, wide(s, x), wide(c, x)),
    ),
    "tables at half width": (
        check_rope,
        lambda x, c, s: kernel("npu_rotary_mul")(x, *(wide(t, x)[..., :4] for t in (c, s))),
    ),
    "a sine with the minus of our tables": (
        check_rope,
        lambda x, c, s: kernel("npu_rotary_mul")(x, wide(c, x), s.view(-1, *s.shape[-3:])),
    ),
    "tables shaped for BNSD": (
        check_rope,
        lambda x, c, s: kernel("npu_rotary_mul")(x, *(wide(t, x).transpose(1, 2) for t in (c, s))),
    ),
    "tables rounded to 16 bits": (
        check_rope,
        lambda x, c, s: kernel("npu_rotary_mul")(x, *(wide(t.half().float(), x) for t in (c, s))),
    ),
    "[up | gate]": (check_swiglu, lambda gate, up: kernel("npu_swiglu")(torch.cat((up, gate), -1))),
    "gate and up one above the other": (
        check_swiglu,
        lambda gate, up: kernel("npu_swiglu")(torch.cat((gate, up), 0)),
    ),
    "a mask that is True where it may be seen": (
        check_softmax,
        lambda x, m, s: kernel("npu_scaled_masked_softmax")(x, ~m, s, False),
    ),
    "no scale in the softmax": (
        check_softmax,
        lambda x, m, s: kernel("npu_scaled_masked_softmax")(x, m),
    ),
    "the reserved triangle of the softmax": (
        check_softmax,
        lambda x, m, s: kernel("npu_scaled_masked_softmax")(x, m, s, True),
    ),
    "no scale in attention": (check_attention, lambda *x: train(*x, scale=None)),
    "no mask in training": (check_attention, lambda *x: train(*x, atten_mask=None)),
    "a mask of the scores' own size in a compressed mode": (
        check_attention,
        lambda q, k, v, d=None: train(
            q,
            k,
            v,
            d,
            atten_mask=torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(
                1 + k.shape[1] - q.shape[1]
            ),
        ),
    ),
    "a mask of what may be seen": (check_attention, lambda *x: train(*x, atten_mask=~TRIANGLE)),
    "causal from the upper left with a cache": (
        check_attention,
        lambda *x: train(*x, sparse_mode=2),
    ),
    "pre_tokens, as the second version spells it": (
        check_attention,
        lambda *x: train(*x, pre_tokens=9),
    ),
    "the key heads' number": (
        check_attention,
        lambda q, k, v, d=None: train(q, k, v, d, head_num=k.shape[2]),
    ),
    "lengths instead of where they end": (
        check_attention,
        lambda q, k, v, d=None: train(
            q,
            k,
            v,
            d,
            **({"actual_seq_qlen": d.lengths, "actual_seq_kvlen": d.lengths} if d else {}),
        ),
    ),
    "documents run together": (check_attention, lambda q, k, v, d=None: train(q, k, v)),
    "heads not said to be shared": (
        check_inference,
        lambda *x: infer(*x, num_key_value_heads=None),
    ),
    "the layout left at BSH": (check_inference, lambda *x: infer(*x, input_layout=None)),
    "a cache that is not contiguous": (check_inference, lambda *x: infer(*x, copy=False)),
    "scale, as the training kernel spells it": (
        check_inference,
        lambda *x: infer(*x, scale_value=None, scale=0.25),
    ),
    "no scale over a cache": (check_inference, lambda *x: infer(*x, scale_value=None)),
    "a prompt without a mask": (
        check_inference,
        lambda *x: infer(*x, atten_mask=None, sparse_mode=None),
    ),
    "beta^t": (check_adamw, lambda w, g, m, v, t, **s: adam(w, g, m, v, t, **s)),
    "m and v swapped": (
        check_adamw,
        lambda w, g, m, v, t, **s: adam(w, g, m, v, t - 1, **s, out=[w, v, m]),
    ),
    "var, m and v by name": (
        check_adamw,
        lambda w, g, m, v, t, **s: adam(w, g, m, v, t - 1, **s, var=w, m=m, v=v),
    ),
}


@pytest.mark.parametrize("check", range(len(RIGHT)))
def test_the_calls_that_the_wrong_ones_start_from_are_right(check: int) -> None:
    RIGHT[check][0](RIGHT[check][1])


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_call_is_caught(mistake: str) -> None:
    check, call = WRONG[mistake]
    with pytest.raises((AssertionError, RuntimeError, ValueError, TypeError)):
        check(call)
