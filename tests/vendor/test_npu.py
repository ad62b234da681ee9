"""Our calls of Ascend's kernels: by the true schemas of torch_npu 2.13.0, against emulations written from the manual (`ascend.py`).
Each comparison is also made with calls that are deliberately wrong, which it must catch. No chip is involved."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minillama.ops import Documents, npu, reference
from tests.parity import wide_tables
from tests.vendor import ascend

BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative, by norm
EPS = 1e-5
each_dtype = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    ascend.install()


@pytest.fixture(autouse=True)
def on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    ascend.CALLS.clear()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same(
    ours: Callable, formula: Callable, *inputs: Tensor, bound: float, trains: bool = True
) -> None:
    """Output and gradients are those of the formula in float64 on the same numbers."""
    mine, exact = (
        [x.detach().clone().to(d).requires_grad_(trains) for x in inputs]
        for d in (inputs[0].dtype, torch.float64)
    )
    y, y64 = ours(*mine), formula(*exact)
    pairs = [(y, y64)]
    if trains:
        upstream = randn(*y.shape, seed=9).to(y.dtype)
        y.backward(upstream)
        y64.backward(upstream.double())
        pairs += [(a.grad, b.grad) for a, b in zip(mine, exact, strict=True)]
    for a, b in pairs:
        assert a.shape == b.shape
        assert float((a.double() - b).norm()) <= bound * float(b.norm())


# The formulas, in the dtype they are given.


def rms_norm64(x: Tensor, w: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * w


def rope64(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    cos, sin = (table.to(x.dtype)[..., x1.shape[-1] :] for table in (cos, sin))
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def attention64(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    (_, T, H, D), (_, S, K, _) = q.shape, k.shape
    k, v = (x.repeat_interleave(H // K, 2) for x in (k, v))
    hidden = torch.arange(S)[None, :] > torch.arange(S - T, S)[:, None]
    if documents is not None:
        document = torch.repeat_interleave(
            torch.arange(len(documents.lengths)), torch.tensor(documents.lengths)
        )
        hidden = hidden | (document[:, None] != document[None, :])
    scores = (torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(D)).masked_fill(hidden, -torch.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


def softmax64(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return (x * scale).masked_fill(mask, -10000.0).softmax(-1)


# Each comparison takes the call to compare, so that wrong ones can be put in its place.


def check_rms_norm(call: Callable, dtype: torch.dtype = torch.float32) -> None:
    for size in (1.0, 1e-3):  # small inputs, where epsilon is most of the sum
        x, w = (size * randn(2, 3, 33)).to(dtype), randn(33, seed=1).to(dtype)
        assert npu.supports_rms_norm(x, w, EPS)
        assert_same(lambda x, w: call(x, w, EPS), rms_norm64, x, w, bound=BOUNDS[dtype])


def check_rope(call: Callable, dtype: torch.dtype = torch.float32) -> None:
    tables = wide_tables(randn(5, 4, seed=1).clamp(-1, 1), randn(5, 4, seed=2).clamp(-1, 1))
    for cos, sin in (tables, [t.expand(2, 5, 1, 8) + 0 * randn(2, 1, 1, 1) for t in tables]):
        x = randn(2, 5, 3, 8).to(dtype)
        assert npu.supports_rope(x, cos, sin)
        assert_same(
            lambda x, c=cos, s=sin: call(x, c, s),
            lambda x, c=cos, s=sin: rope64(x, c, s),
            x,
            bound=BOUNDS[dtype],
        )


def check_swiglu(call: Callable, dtype: torch.dtype = torch.float32) -> None:
    gate, up = randn(2, 7, 11).to(dtype), randn(2, 7, 11, seed=1).to(dtype)
    assert npu.supports_swiglu(gate, up)
    assert_same(call, lambda g, u: g / (1 + (-g).exp()) * u, gate, up, bound=BOUNDS[dtype])


def check_softmax(call: Callable, dtype: torch.dtype = torch.float32) -> None:
    x, mask = randn(2, 3, 32, 64).to(dtype), torch.ones(32, 64, dtype=torch.bool).triu(33)
    assert npu.supports_scaled_masked_softmax(x, mask, 0.3)
    assert_same(
        lambda x: call(x, mask, 0.3), lambda x: softmax64(x, mask, 0.3), x, bound=BOUNDS[dtype]
    )


def check_attention(call: Callable, dtype: torch.dtype = torch.float32) -> None:
    for H, K in ((6, 6), (6, 3), (6, 1)):
        for T, S in ((9, 9), (3, 9)):
            qkv = [
                randn(2, T, H, 8).to(dtype),
                randn(2, S, K, 8, seed=1).to(dtype),
                randn(2, S, K, 8, seed=2).to(dtype),
            ]
            assert_same(call, attention64, *qkv, bound=BOUNDS[dtype])
        d = Documents([4, 1, 7])
        qkv = [randn(1, 12, heads, 8, seed=i).to(dtype) for i, heads in enumerate((H, K, K))]
        assert npu.supports_attention(*qkv, d)
        assert_same(
            lambda q, k, v, d=d: call(q, k, v, d),
            lambda q, k, v, d=d: attention64(q, k, v, d),
            *qkv,
            bound=BOUNDS[dtype],
        )


def check_inference(call: Callable, dtype: torch.dtype = torch.float16) -> None:
    """Prompt, continuation and single query, over the cache as it lies: a stretch of a longer buffer."""
    for T, S in ((9, 9), (3, 9), (1, 9)):
        cache = [randn(2, 20, 3, 16, seed=i).to(dtype) for i in (1, 2)]
        q = randn(2, T, 6, 16).to(dtype)
        with torch.no_grad():
            assert npu.supports_attention(q, *(x[:, :S] for x in cache))
            y = call(q, *(x[:, :S] for x in cache))
        exact = attention64(q.double(), *(x[:, :S].double() for x in cache))
        assert y.shape == q.shape
        assert float((y.double() - exact).norm()) <= BOUNDS[dtype] * float(exact.norm())


def check_adamw(call: Callable, dtype: torch.dtype = torch.float32) -> None:
    settings = {
        "learning_rate": 1e-2,
        "beta1": 0.9,
        "beta2": 0.95,
        "epsilon": 1e-6,
        "weight_decay": 0.1,
    }
    mine, theirs = (
        [randn(40).to(d), torch.zeros(40, dtype=d), torch.zeros(40, dtype=d)]
        for d in (dtype, torch.float64)
    )
    for step in (1, 2, 3):
        grad = randn(40, seed=step).to(dtype)
        assert npu.supports_adamw(mine[0], grad, *mine[1:], step, **settings)
        call(mine[0], grad, *mine[1:], step, **settings)
        reference.adamw(theirs[0], grad.double(), *theirs[1:], step, **settings)
    for a, b in zip(mine, theirs, strict=True):
        assert float((a.double() - b).norm()) <= BOUNDS[dtype] * float(b.norm())


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


F16 = torch.float16


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
def test_what_the_manual_excludes_is_left_to_another_form(
    guard: Callable, arguments: tuple
) -> None:
    assert not guard(*arguments)
