"""The formulas of LLaMA, one function each: this file is the specification that every faster form is tested against.

Shapes: B batch, T query positions, S key positions, C model width, H query heads, K key/value heads, D head size,
F MLP width, V vocabulary, N rows of anything.
Statistics, rotations, softmax and losses are computed in fp32 whatever the dtype of the data, and rounded once.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama.llama_config import LlamaConfig, RopeScaling
from minillama.ops.packing import Documents

IGNORE = -100  # the label of a position that is not trained on
MASKED = (
    -10000.0
)  # the score of a masked position, which exp() makes 0; finite, so a row masked whole has no 0/0


def needs_grad(*inputs: Tensor) -> bool:
    """Whether a gradient will be asked for: what decoding calls without one may take another path than training."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019, eq. 4).
    x (..., C), weight (C,). The normalized x is rounded to x's dtype before the product, as Hugging Face's LLaMA does."""
    x32 = x.float()
    r = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)  # (..., 1)
    return (x32 * r).to(x.dtype) * weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, eq. 6 without biases). Both (..., F)."""
    return F.silu(gate) * up


def scaled_masked_softmax(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale x) over the last dimension, scores at True positions of `mask` (broadcast to x) replaced by MASKED.
    What Megatron's and Ascend's kernels of this name compute: a row that is masked whole comes out uniform."""
    return (x.float() * scale).masked_fill(mask, MASKED).softmax(-1).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. x (..., in), weight (out, in), bias (out,)."""
    return F.linear(x, weight, bias)


def rope_frequencies(config: LlamaConfig, length: int) -> tuple[Tensor, float]:
    """The angle each pair of dimensions turns per position, (D/2,) fp32, and the factor on cos and sin.
    Pair i turns by theta^(-2i/D) (Su et al. 2021, eq. 15). `length`, the longest position in use, matters to "dynamic" only."""
    D, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    if (
        scaling and scaling.kind == "dynamic"
    ):  # NTK: enlarge theta so that the slowest pair just covers `length`
        stretch = scaling.factor * max(length, config.max_seq_len) / config.max_seq_len - (
            scaling.factor - 1
        )
        theta = theta * stretch ** (D / (D - 2))
    wavelength_over_2pi = theta ** (torch.arange(0, D, 2, dtype=torch.float32) / D)
    frequencies = 1.0 / wavelength_over_2pi
    if scaling is None or scaling.kind == "dynamic":
        return frequencies, 1.0
    if scaling.kind == "linear":  # position interpolation (Chen et al. 2023)
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3_frequencies(frequencies, scaling), 1.0
    return _yarn_frequencies(
        frequencies, scaling, theta, scaling.original_max_seq_len or config.max_seq_len
    )


def _llama3_frequencies(frequencies: Tensor, s: RopeScaling) -> Tensor:
    """Pairs that turn often within the old context stay, those that turn seldom are slowed by `factor`, between them a ramp."""
    turns = (
        s.original_max_seq_len * frequencies / (2 * math.pi)
    )  # full turns within the old context
    keep = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return frequencies * keep + frequencies / s.factor * (1 - keep)


def _yarn_frequencies(
    frequencies: Tensor, s: RopeScaling, theta: float, old_context: int
) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, sections 3.2 and 3.4): the ramp runs over the pair's index, and the logits are sharpened."""
    half = len(frequencies)

    def index_of_pair_turning(turns: float) -> float:
        return half * math.log(old_context / (turns * 2 * math.pi)) / math.log(theta)

    low, high = index_of_pair_turning(s.beta_fast), index_of_pair_turning(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    slowed = ((torch.arange(half, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    sharpen = s.attention_factor
    if sharpen is None and s.mscale and s.mscale_all_dim:
        sharpen = _yarn_mscale(s.factor, s.mscale) / _yarn_mscale(s.factor, s.mscale_all_dim)
    elif sharpen is None:
        sharpen = _yarn_mscale(s.factor, 1.0)
    return frequencies / s.factor * slowed + frequencies * (1 - slowed), sharpen


def _yarn_mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_tables(config: LlamaConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position below `length`, each (length, 1, D) fp32: for both halves of a head, sin with the sign it has there."""
    frequencies, factor = rope_frequencies(config, length)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)  # (length, D/2)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), dim=-1).unsqueeze(1), torch.cat((-sin, sin), dim=-1).unsqueeze(1)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + D/2}) of every head by its position's angle: Hugging Face's rotate-half layout.
    x (B, T, H, D); cos and sin (T, 1, D) as in `rope_tables`, or (B, T, 1, D) where the rows of the batch stand at different positions."""
    x32 = x.float()
    return (x32 * cos + x32.roll(x.shape[-1] // 2, dims=-1) * sin).to(
        x.dtype
    )  # (x1 cos - x2 sin, x2 cos + x1 sin)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Causal softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, eq. 1), with K <= H key/value heads shared by groups (GQA).
    q (B, T, H, D); k, v (B, S, K, D) with S >= T: the queries stand at the last T of the S positions. Returns (B, T, H, D).
    documents: the B·T positions are a run of these documents, and none sees another (then S = T).
    lengths: row b has lengths[b] <= S positions, the last T of them its queries; what follows them is hidden, but must be finite."""
    B, T, H, D = q.shape
    S, K = k.shape[1], k.shape[2]
    if documents is not None:
        numbers = torch.tensor(documents.lengths)
        document = torch.repeat_interleave(torch.arange(len(numbers)), numbers).to(q.device)
        q, k, v = (x.reshape(1, B * T, -1, D) for x in (q, k, v))
        allowed = document[:, None] == document[None, :]
        allowed &= torch.ones_like(allowed).tril()
    else:
        allowed = seen_keys(T, S, lengths, q.device)
    k = k.repeat_interleave(H // K, dim=2)  # (B, S, H, D)
    v = v.repeat_interleave(H // K, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q.float(), k.float()) / math.sqrt(D)
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v.float()).to(q.dtype).reshape(B, T, H, D)


def seen_keys(T: int, S: int, lengths: Tensor | None, device: torch.device) -> Tensor:
    """Which of S keys each of the last T queries of a row sees, bool: (T, S), or (B, 1, T, S) for rows of these lengths (B,)."""
    key, end = torch.arange(S, device=device), S if lengths is None else lengths.view(-1, 1, 1, 1)
    return key <= end - T + torch.arange(T, device=device).unsqueeze(1)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The *sum* over labelled positions of -log softmax(hidden W^T)[label]: a scalar, fp32.
    hidden (..., C), weight (V, C), labels (...) with IGNORE where nothing is predicted. A sum, because only the caller knows how many
    targets the whole global batch has; no labelled position gives 0, not nan."""
    logits = F.linear(hidden.float(), weight.float()).flatten(0, -2)  # (N, V)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")


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
    """One AdamW step in place (Loshchilov & Hutter 2019, algorithm 2). All tensors the same shape, fp32; step counts from 1."""
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    unbiased_m, unbiased_v = m / (1 - beta1**step), v / (1 - beta2**step)
    weight.mul_(1 - learning_rate * weight_decay)
    weight.sub_(learning_rate * unbiased_m / (unbiased_v.sqrt() + epsilon))
