"""torch_npu's fused kernels, emulated.

The schemas are the true ones (npu_schemas.json, as the 2.13.0 wheel registers them). Behind each is
the formula and the limits of its manual page, in differentiable torch. A call outside a limit
raises ValueError, as the vendor's checks would.

Written from the manual, not from `minillama.ops`: nothing of that package is used here. What is
emulated is what the manual says; whether the silicon agrees is not known here.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SCHEMAS = json.loads((Path(__file__).parent / "npu_schemas.json").read_text())["schemas"]
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
CALLS: list[str] = []  # names of the kernels called so far
_KEPT: list[torch.library.Library] = []


def need(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    need(
        x.dtype in FLOATS and gamma.dtype == x.dtype,
        f"npu_rms_norm: x is {x.dtype}, gamma {gamma.dtype}",
    )
    need(2 <= x.dim() <= 8, f"npu_rms_norm: {x.dim()} dimensions")
    rstd = (x.float().pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
    return (x.float() * rstd * gamma.float()).to(x.dtype), rstd


def rotary_mul(
    x: Tensor, cos: Tensor, sin: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    need(rotary_mode == "half" and rotate is None, "npu_rotary_mul: only half is emulated")
    need(x.dim() == cos.dim() == sin.dim() == 4, "npu_rotary_mul: 4 dimensions")
    B, S, N, D = x.shape  # BSND
    need(D % 2 == 0 and D < 896 and B < 1000 and N < 1000, f"npu_rotary_mul: {tuple(x.shape)}")
    need(x.dtype == cos.dtype == sin.dtype, "npu_rotary_mul: one dtype")
    for table in (cos, sin):
        need(
            tuple(table.shape) in {(1, S, 1, D), (B, S, 1, D), (B, S, N, D)},
            f"npu_rotary_mul: {tuple(x.shape)}, {tuple(table.shape)}",
        )
    x1, x2 = x.float().chunk(2, -1)
    return (x.float() * cos.float() + torch.cat((-x2, x1), -1) * sin.float()).to(x.dtype)


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    need(x.dtype in FLOATS and 1 <= x.dim() <= 8, "npu_swiglu: dtype or dimensions")
    a, b = x.chunk(2, dim)
    return (a.float() * a.float().sigmoid() * b.float()).to(x.dtype)


def scaled_masked_softmax(
    x: Tensor, mask: Tensor, scale: float = 1.0, fixed_triu_mask: bool = False
) -> Tensor:
    need(not fixed_triu_mask, "npu_scaled_masked_softmax: fixed_triu_mask is reserved")
    need(x.dtype in FLOATS and mask.dtype == torch.bool, "npu_scaled_masked_softmax: dtypes")
    sides = x.shape[-2:]
    need(
        x.dim() == 4 and all(32 <= side <= 4096 and side % 32 == 0 for side in sides),
        f"npu_scaled_masked_softmax: {tuple(x.shape)}",
    )
    return (x.float() * scale).masked_fill(mask.expand_as(x), -10000.0).softmax(-1).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q (B, S, N, D), k and v (B, S', N', D), mask (S, S') True = hidden."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bsnd,btnd->bnst", q.float(), k.float()) * scale
    if mask is not None:
        need(not bool(mask.all(-1).any()), "attention: a query sees nothing")
        scores = scores.masked_fill(mask, -torch.inf)
    return torch.einsum("bnst,btnd->bsnd", scores.softmax(-1), v.float()).to(q.dtype)


def _causal_mask(mask: Tensor | None, mode: int, S: int, T: int) -> Tensor | None:
    """What a sparse mode makes of the mask it was given, (S, T)."""
    if mask is None:
        return None  # the manual: without a mask the mode means nothing, everything is computed
    need(mask.dtype in (torch.bool, torch.uint8), "attention: the mask is bool or uint8")
    if mode == 0:
        need(
            tuple(mask.shape[-2:]) == (S, T),
            f"attention: mode 0 wants the whole mask, {tuple(mask.shape)} for {S} x {T}",
        )
        return mask.bool().view(S, T)
    need(mode in (2, 3), f"attention: sparse_mode {mode} is not emulated")
    need(
        tuple(mask.shape[-2:]) == (2048, 2048),
        f"attention: mode {mode} wants the 2048 x 2048 triangle, not {tuple(mask.shape)}",
    )
    need(
        torch.equal(mask.bool().cpu(), torch.ones(2048, 2048, dtype=torch.bool).triu(1)),
        "attention: not the triangle above the diagonal",
    )
    return torch.ones(S, T, dtype=torch.bool, device=mask.device).triu(
        1 + (T - S if mode == 3 else 0)
    )


def _check_heads(q: Tensor, k: Tensor, v: Tensor, heads: int, head_dim: int) -> None:
    need(k.shape == v.shape and q.dtype == k.dtype == v.dtype, "attention: keys and values differ")
    need(
        q.shape[-2] == heads and q.shape[-2] % k.shape[-2] == 0 and heads <= 256,
        f"attention: {heads} heads of {tuple(q.shape)}",
    )
    need(q.shape[-1] <= head_dim, f"attention: head size {q.shape[-1]}")


def fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Any = None,
    padding_mask: Any = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix: Any = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Any = None,
    dropout_mask: Any = None,
    seed: int = 0,
    offset: int = 0,
) -> tuple:
    need(
        pse is padding_mask is prefix is sink is dropout_mask is None and keep_prob == 1.0,
        "npu_fusion_attention: not emulated",
    )
    _check_heads(query, key, value, head_num, 768)
    need(query.dtype in FLOATS, "npu_fusion_attention: dtype")
    need(
        input_layout in ("BSND", "TND"),
        f"npu_fusion_attention: layout {input_layout} is not emulated",
    )
    if input_layout == "BSND":
        y = _attend(
            query,
            key,
            value,
            _causal_mask(atten_mask, sparse_mode, query.shape[1], key.shape[1]),
            scale,
        )
        statistics = query.new_zeros(
            query.shape[0], head_num, query.shape[1], 8, dtype=torch.float32
        )
    else:
        need(
            query.dim() == 3 and actual_seq_qlen is not None and actual_seq_kvlen is not None,
            "npu_fusion_attention: TND wants lengths",
        )
        need(
            len(actual_seq_qlen) <= 1024 and actual_seq_qlen == sorted(actual_seq_qlen),
            "npu_fusion_attention: lengths are running sums",
        )
        need(
            actual_seq_qlen[-1] == len(query) and actual_seq_kvlen[-1] == len(key),
            "npu_fusion_attention: lengths do not add up",
        )
        parts = []
        for start, end, k_start, k_end in zip(
            [0, *actual_seq_qlen],
            actual_seq_qlen,
            [0, *actual_seq_kvlen],
            actual_seq_kvlen,
            strict=False,
        ):
            mask = _causal_mask(atten_mask, sparse_mode, end - start, k_end - k_start)
            parts.append(
                _attend(
                    query[None, start:end],
                    key[None, k_start:k_end],
                    value[None, k_start:k_end],
                    mask,
                    scale,
                )[0]
            )
        y, statistics = (
            torch.cat(parts),
            query.new_zeros(head_num, len(query), 8, dtype=torch.float32),
        )
    return y, statistics, statistics.clone(), query.new_zeros(0), 0, 0, 0


def _check_inference(
    q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int, layout: str
) -> None:
    need(layout == "BSND" and q.dim() == 4, "inference attention: only BSND is emulated")
    _check_heads(q, k, v, heads, 512)
    need(
        kv_heads == k.shape[2],
        f"inference attention: num_key_value_heads {kv_heads}, but {k.shape[2]} are there",
    )
    need(q.dtype in (torch.float16, torch.bfloat16), f"inference attention: {q.dtype}")
    need(heads // kv_heads <= 64, "inference attention: at most 64 query heads for one key head")
    need(not (q.requires_grad and torch.is_grad_enabled()), "inference attention: has no backward")


def prompt_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    padding_mask: Any = None,
    atten_mask: Tensor | None = None,
    pse_shift: Any = None,
    actual_seq_lengths: Any = None,
    deq_scale1: Any = None,
    quant_scale1: Any = None,
    deq_scale2: Any = None,
    quant_scale2: Any = None,
    quant_offset2: Any = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    pre_tokens: int = 2147483647,
    next_tokens: int = 0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    actual_seq_lengths_kv: Any = None,
    sparse_mode: int = 0,
) -> Tensor:
    _check_inference(query, key, value, num_heads, num_key_value_heads, input_layout)
    need(
        all(x.is_contiguous() for x in (query, key, value)),
        "npu_prompt_flash_attention: contiguous tensors only",
    )
    need(
        query.shape[-1] % 16 == 0 and num_heads * query.shape[-1] < 65535,
        f"npu_prompt_flash_attention: {tuple(query.shape)}",
    )
    return _attend(
        query,
        key,
        value,
        _causal_mask(atten_mask, sparse_mode, query.shape[1], key.shape[1]),
        scale_value,
    )


def incre_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    padding_mask: Any = None,
    atten_mask: Tensor | None = None,
    pse_shift: Any = None,
    actual_seq_lengths: Any = None,
    antiquant_scale: Any = None,
    antiquant_offset: Any = None,
    block_table: Any = None,
    dequant_scale1: Any = None,
    quant_scale1: Any = None,
    dequant_scale2: Any = None,
    quant_scale2: Any = None,
    quant_offset2: Any = None,
    kv_padding_size: Any = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    block_size: int = 0,
    inner_precise: int = 1,
) -> Tensor:
    _check_inference(query, key, value, num_heads, num_key_value_heads, input_layout)
    need(query.shape[1] == 1, f"npu_incre_flash_attention: one query, not {query.shape[1]}")
    return _attend(
        query, key, value, None if atten_mask is None else atten_mask.view(1, -1), scale_value
    )


def apply_adam_w(
    beta1_power: float,
    beta2_power: float,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    grad: Tensor,
    max_grad_norm: Tensor | None,
    amsgrad: bool | None,
    maximize: bool | None,
    *,
    out: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The manual: beta^t = beta_power * beta, so the powers given are those of the step before."""
    var, m, v = out
    need(not amsgrad and not maximize and max_grad_norm is None, "npu_apply_adam_w: not emulated")
    need(
        var.dtype == m.dtype == v.dtype == grad.dtype and var.shape == grad.shape,
        "npu_apply_adam_w: dtypes or shapes",
    )
    m.copy_(beta1 * m + (1 - beta1) * grad)
    v.copy_(beta2 * v + (1 - beta2) * grad * grad)
    m_hat, v_hat = m / (1 - beta1_power * beta1), v / (1 - beta2_power * beta2)
    var.copy_(var - lr / (v_hat.sqrt() + epsilon) * m_hat - lr * weight_decay * var)
    return var, m, v


KERNELS: dict[str, Callable] = {
    "npu_rms_norm": rms_norm,
    "npu_rotary_mul": rotary_mul,
    "npu_swiglu": swiglu,
    "npu_scaled_masked_softmax": scaled_masked_softmax,
    "npu_fusion_attention": fusion_attention,
    "npu_prompt_flash_attention": prompt_flash_attention,
    "npu_incre_flash_attention": incre_flash_attention,
    "npu_apply_adam_w.out": apply_adam_w,
}


def _counted(name: str, kernel: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        CALLS.append(name)
        return kernel(*args, **kwargs)

    return call


def install() -> None:
    """Register the kernels under `torch.ops.npu`, for tensors of any device.

    Does nothing the second time.
    """
    if _KEPT:
        return
    library = torch.library.Library("npu", "DEF")
    for name, kernel in KERNELS.items():
        library.define(SCHEMAS[name].removeprefix("npu::"))
        library.impl(name, _counted(name, kernel), "CompositeImplicitAutograd")
    _KEPT.append(library)
