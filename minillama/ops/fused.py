"""The ops with their backward derived by hand: the same numbers, fewer tensors kept for backward, on every device.

Autograd keeps what each elementary step of a formula touched. Deriving the backward of the whole formula by hand shows
how little is really needed: RMSNorm needs its input and one number a row, the cross entropy needs no logits at all.
`reference.py` is what each of these must equal.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama.ops import packed_weights, reference
from minillama.ops.packed_weights import has_bf16_units
from minillama.ops.packing import Documents
from minillama.ops.reference import IGNORE, needs_grad, seen_keys

MATVEC_ROWS = 6  # rows up to which a product each is cheaper than turning the weight into fp32
LOGIT_CHUNK = (
    6 << 20
)  # elements of logits that exist at a time, 24 MiB in fp32, or an eighth of the head's where that is more
CACHED = (
    1 << 17
)  # elements of a block of rows that is worked on within a processor's cache: 512 KiB in fp32


def _row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of several tensors (..., anything), as many at a time as the processor's cache holds; elsewhere all at once.
    A tensor to be written must be contiguous."""
    rows = [x.reshape(-1, x.shape[-1]) for x in tensors]
    height = max(1, CACHED // rows[0].shape[1] if tensors[0].device.type == "cpu" else len(rows[0]))
    return zip(*(x.split(height) for x in rows), strict=True)


class _RMSNorm(torch.autograd.Function):
    """With r = rsqrt(mean(x^2) + eps), n = x r and g = dy w:   dx = r (g - n mean(g n)),   dw = sum over rows of dy n."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = torch.empty(x.shape, dtype=torch.result_type(x, weight), device=x.device)
        r = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
        for x_, y_, r_ in _row_blocks(x, y, r):
            x32 = x_.float()
            torch.rsqrt(
                torch.linalg.vecdot(x32, x32).unsqueeze(-1).div_(x.shape[-1]).add_(eps), out=r_
            )
            torch.mul((x32 * r_).to(x.dtype), weight, out=y_)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, r = ctx.saved_tensors
        w, dw = weight.float(), torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for dy_, x_, r_, dx_ in _row_blocks(dy, x, r, dx):
            n, dy32 = x_.float() * r_, dy_.float()
            dyn = dy32 * n
            if ctx.needs_input_grad[1]:
                dw += dyn.sum(0)
            mean = (dyn @ w).div_(x.shape[-1]).unsqueeze(-1)  # of g n, since g n = (dy n) w
            torch.mul(torch.mul(dy32, w, out=dyn).addcmul_(n, mean, value=-1), r_, out=dx_)
        return dx, dw.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`, keeping x (alive anyway) and one fp32 number a row; row blocks stay in the cache."""
    return (
        _RMSNorm.apply(x, weight, eps)
        if needs_grad(x, weight)
        else F.rms_norm(x, weight.shape, weight, eps)
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`reference.rope` in three passes over as many positions as the processor's cache holds; elsewhere over all."""

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin)

    if x.numel() <= CACHED or not x.is_cpu:
        return turned(x, cos, sin).to(x.dtype)
    y, count = torch.empty_like(x), max(1, CACHED * x.shape[1] // x.numel())
    for y_, *parts in zip(*(t.split(count, dim=-3) for t in (y, x, cos, sin)), strict=True):
        y_.copy_(turned(*parts))
    return y


class _Rope(torch.autograd.Function):
    """A rotation's transpose is its inverse:   dx = dy turned by the opposite angles. Of x, nothing is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, dy: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, -sin), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`reference.rope`, keeping the tables (shared by all layers) only."""
    return _Rope.apply(x, cos, sin) if needs_grad(x) else _rotate(x, cos, sin)


class _SwiGLU(torch.autograd.Function):
    """With s = sigmoid(a), silu = a s and silu' = s (1 + a (1 - s)), for y = silu(a) b:   da = dy b silu',   db = dy silu.
    silu(a) is computed again, in place, instead of being kept."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, dy: Tensor):
        gate, up = ctx.saved_tensors
        dgate = dy * up
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        return dgate, F.silu(gate).mul_(dy)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`reference.swiglu`, keeping gate and up only."""
    return _SwiGLU.apply(gate, up) if needs_grad(gate, up) else F.silu(gate).mul_(up)


class _ScaledMaskedSoftmax(torch.autograd.Function):
    """dx = scale y (dy - sum of dy y over the row), and 0 where masked."""

    @staticmethod
    def forward(ctx, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        z = x.float().mul(scale).masked_fill_(mask, reference.MASKED)
        y = torch.softmax(z, -1, out=z).to(x.dtype)
        ctx.save_for_backward(y, mask)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        y, mask = ctx.saved_tensors
        y32 = y.float()
        dx = dy.float() * y32
        dx.addcmul_(y32, dx.sum(-1, keepdim=True), value=-1).mul_(ctx.scale).masked_fill_(mask, 0.0)
        return dx.to(y.dtype), None, None


def scaled_masked_softmax(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`reference.scaled_masked_softmax` in one buffer, keeping y (and the mask, alive anyway)."""
    return _ScaledMaskedSoftmax.apply(x, mask, scale)


class _Linear16(torch.autograd.Function):
    """y = x W^T with 16-bit data and fp32 arithmetic:   dx = dy W,   dW = dy^T x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(
            x.dtype
        )

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        dy32 = dy.float()
        need_x, need_w, need_b = ctx.needs_input_grad
        dx = (dy32 @ weight.float()).to(x.dtype) if need_x else None
        rows = dy32.flatten(0, -2)
        dw = (rows.T @ x.float().flatten(0, -2)).to(weight.dtype) if need_w else None
        return dx, dw, rows.sum(0).to(weight.dtype) if need_b else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`reference.linear`; of 16-bit data on a processor without units for it, fp32 products rounded once: many times faster.
    Decoding (no gradient, few rows) is bound by reading the weight: see `ops.packed_weights`, and a product for each row reads no slower."""
    if weight.is_mkldnn:
        return packed_weights.linear(x, weight, bias)
    if x.dtype is torch.float32 or not x.is_cpu:
        return F.linear(x, weight, bias)
    rows, is_bf16 = x.numel() // x.shape[-1], x.dtype is torch.bfloat16
    if is_bf16 and not torch.is_grad_enabled() and rows <= (1 if has_bf16_units() else MATVEC_ROWS):
        y = torch.stack(
            [
                torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
                for row in x.reshape(rows, -1)
            ]
        )
        return y.view(*x.shape[:-1], -1)
    return (
        F.linear(x, weight, bias)
        if is_bf16 and has_bf16_units()
        else _Linear16.apply(x, weight, bias)
    )


class _Rearrange(torch.autograd.Function):
    """y = x[there]. Each x is read at one place that matters, `back`, or not at all (`holes`): backward is a gather too."""

    @staticmethod
    def forward(ctx, x: Tensor, there: Tensor, back: Tensor, holes: Tensor | None) -> Tensor:
        ctx.back, ctx.holes = back, holes
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx, dy: Tensor):
        dx = dy.index_select(0, ctx.back)
        return dx if ctx.holes is None else dx.index_fill_(0, ctx.holes, 0), None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """`reference.attention` by torch's scaled_dot_product_attention, which never holds the T x S scores.
    Documents of like length are rows of one call (`ops.packing` has the picture), so a run of them costs about the sum of their squared
    lengths. Cached decoding takes the heads of a group as if they were positions: keys and values are read once and never expanded."""
    if documents is None:
        return (
            _causal(q, k, v)
            if lengths is None and k.shape[1] == q.shape[1]
            else _cached(q, k, v, lengths)
        )
    if len(documents.lengths) == 1 and q.shape[0] == 1:
        return _causal(q, k, v)
    B, T, H, D = q.shape
    slots, back, holes = documents.layout
    sizes = [n * length for n, length in documents.group_shapes]
    parts = [
        _Rearrange.apply(x.reshape(B * T, -1), slots, back, None).split(sizes) for x in (q, k, v)
    ]  # (slots, heads·D)
    y = [
        _causal(*(x.view(*shape, -1, D) for x in group)).reshape(-1, H * D)
        for shape, *group in zip(documents.group_shapes, *parts, strict=True)
    ]
    return _Rearrange.apply(torch.cat(y), back, slots, holes).view(B, T, H, D)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """S = T."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _cached(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
    """S >= T, or rows of unlike length."""
    (B, T, H, D), (_, S, K, _) = q.shape, k.shape
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if T == 1 and lengths is None:  # a step of decoding
        return F.scaled_dot_product_attention(q.view(B, K, -1, D), k, v).view(B, 1, H, D)
    q = (
        q.view(B, T, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B, K, -1, D)
    )  # (B, K, H/K·T, D): a group's heads, each with T positions
    y = F.scaled_dot_product_attention(q, k, v, _mask(T, S, lengths, H // K, q.dtype, q.device))
    return y.view(B, K, H // K, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


@lru_cache(maxsize=1)
@torch.inference_mode(False)
def _mask(
    T: int, S: int, lengths: Tensor | None, groups: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """-inf at the scores that a query must not see, (T·groups, S) or (B, 1, T·groups, S): made by the first layer of a step, which hands
    the same `lengths` to all."""
    seen = torch.cat([seen_keys(T, S, lengths, device)] * groups, dim=-2)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


class _LinearCrossEntropy(torch.autograd.Function):
    """Per chunk of positions: z = h W^T, p = softmax(z), loss -= log p[label]; with d = p - onehot: dh = d W, dW += d^T h.
    z, log p, p and d are one buffer. The gradients are formed in forward, while the chunk's logits exist, and only scaled in backward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        need_h, need_w = ctx.needs_input_grad[:2]
        kept = (labels != IGNORE).nonzero().squeeze(1)
        chunk = min(
            len(kept), max(1, LOGIT_CHUNK // len(weight), weight.shape[1] // 8)
        )  # each reads and writes all of dW
        weight32 = weight.float()
        logits = torch.empty(
            chunk, len(weight), dtype=torch.float32, device=weight.device
        )  # the only ones there are
        loss = torch.zeros((), dtype=torch.float32, device=weight.device)
        dh = torch.zeros_like(hidden) if need_h else None
        dw = torch.zeros_like(weight32) if need_w else None
        for rows in kept.split(chunk or 1):
            h, label = hidden[rows].float(), labels[rows].unsqueeze(1)
            z = torch.mm(h, weight32.T, out=logits[: len(rows)])  # (chunk, V)
            log_p = torch.log_softmax(z, 1, out=z)
            loss -= log_p.gather(1, label).sum()
            if not (need_h or need_w):
                continue
            d = log_p.exp_().scatter_add_(1, label, h.new_full(label.shape, -1.0))
            if need_h:
                dh[rows] = (d @ weight32).to(dh.dtype)
            if need_w:
                dw.addmm_(d.T, h)
        ctx.save_for_backward(dh, dw)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, dloss: Tensor):
        dh, dw = ctx.saved_tensors
        dh = None if dh is None else dh.mul_(dloss)
        return dh, None if dw is None else dw.mul_(dloss).to(ctx.dtype), None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`reference.linear_cross_entropy` without ever holding the logits: labelled positions only, a chunk of them at a time."""
    return _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten())


def adamw(
    weight: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
) -> None:
    """`reference.adamw` as torch's one-pass kernel."""
    torch._fused_adamw_(
        [weight],
        [grad],
        [m],
        [v],
        [],
        [torch.tensor(float(step), device=weight.device)],
        lr=learning_rate,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=epsilon,
        amsgrad=False,
        maximize=False,
    )
