"""Ascend's three attention kernels, emulated from the manual like the others in `ascend.py`."""

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def need(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


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
