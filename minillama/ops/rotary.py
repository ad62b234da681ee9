"""The angles of RoPE: how far a pair of dimensions turns per position, and tables of cos and sin.

A head of size D is D/2 pairs (x_i, x_{i + D/2}). At position p, pair i is rotated by the angle
p * frequency_i (Su et al. 2021):

    frequency_i = theta^(-2i/D)      pair 0 turns fastest, once in 2 pi positions

Beyond the trained context the angles are new to the model. `rope_scaling` in config.json changes
the frequencies:

    linear     all frequencies / factor: positions fit the old context (Chen et al. 2023)
    dynamic    a larger theta, so that the slowest pair just covers the current length ("NTK")
    llama3     fast pairs stay, slow pairs are divided by factor, with a ramp between (LLaMA 3.1)
    yarn       the same with a ramp over the index, and sharper attention (Peng et al. 2023)

`reference.rope` applies the tables. D head size, S positions.
"""

import math

import torch
from torch import Tensor

from minillama.llama_config import LlamaConfig, RopeScaling


def rope_frequencies(config: LlamaConfig, length: int) -> Tensor:
    """The angle that each pair of dimensions turns per position, (D/2,) fp32.

    length: the longest position in use. Only "dynamic" scaling depends on it.
    """
    D = config.head_dim
    scaling = config.rope_scaling
    theta = _rope_theta(config, length)
    frequencies = 1.0 / theta ** (torch.arange(0, D, 2, dtype=torch.float32) / D)
    if scaling is None or scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _llama3_frequencies(frequencies, scaling)
    old_context = scaling.original_max_seq_len or config.max_seq_len
    return _yarn_frequencies(frequencies, scaling, theta, old_context)


def is_dynamic(config: LlamaConfig) -> bool:
    """Whether the frequencies depend on the length of the sequence."""
    return config.rope_scaling is not None and config.rope_scaling.kind == "dynamic"


def _rope_theta(config: LlamaConfig, length: int) -> float:
    """rope_theta; with "dynamic" scaling enlarged so that the slowest pair just covers `length`."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "dynamic":
        return config.rope_theta
    D, context = config.head_dim, config.max_seq_len
    theta_factor = scaling.factor * max(length, context) / context - (scaling.factor - 1)
    return config.rope_theta * theta_factor ** (D / (D - 2))


def _llama3_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Keep pairs that turn often within the old context, divide the others by `factor`.

    Between low_freq_factor and high_freq_factor turns the two are mixed by a linear ramp.
    """
    assert scaling.original_max_seq_len is not None  # llama_config requires it
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)
    ramp_width = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / ramp_width).clamp(0, 1)
    return frequencies * keep + frequencies / scaling.factor * (1 - keep)


def _yarn_frequencies(
    frequencies: Tensor, scaling: RopeScaling, theta: float, old_context: int
) -> Tensor:
    """Keep the pairs before `low`, divide those after `high` by `factor`, mix between (sec. 3.2).

    low and high are the pairs that make beta_fast and beta_slow turns within the old context.
    """
    num_pairs = len(frequencies)

    def pair_with_turns(turns: float) -> float:
        """The index i, a fraction, for which old_context * theta^(-i / num_pairs) = 2 pi turns."""
        return num_pairs * math.log(old_context / (turns * 2 * math.pi)) / math.log(theta)

    low = pair_with_turns(scaling.beta_fast)
    high = pair_with_turns(scaling.beta_slow)
    if scaling.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, 2 * num_pairs - 1)
    index = torch.arange(num_pairs, dtype=torch.float32)
    slowed = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / scaling.factor * slowed + frequencies * (1 - slowed)


def rope_magnitude(config: LlamaConfig) -> float:
    """The factor on cos and sin: 1, but for YaRN, which sharpens attention by it (section 3.4)."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        numerator = _yarn_mscale(scaling.factor, scaling.mscale)
        return numerator / _yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return _yarn_mscale(scaling.factor, 1.0)


def _yarn_mscale(factor: float, weight: float) -> float:
    if factor <= 1:
        return 1.0
    return 0.1 * weight * math.log(factor) + 1.0


def rope_tables(config: LlamaConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position below `length`, each (length, 1, D) fp32.

    Both halves of a head are there: cos is (cos, cos), and sin is (-sin, sin), with the sign that
    each half needs in `reference.rope`.
    """
    positions = torch.arange(length, dtype=torch.float32)
    angles = torch.outer(positions, rope_frequencies(config, length))  # (length, D/2)
    magnitude = rope_magnitude(config)
    cos = angles.cos() * magnitude
    sin = angles.sin() * magnitude
    wide_cos = torch.cat((cos, cos), dim=-1)  # (length, D)
    wide_sin = torch.cat((-sin, sin), dim=-1)
    return wide_cos.unsqueeze(1), wide_sin.unsqueeze(1)


class RotaryTables:
    """The tables of a model, kept from call to call and computed again if they do not fit.

    They are fp32 whatever the dtype of the model, so they are neither buffers nor in checkpoints.
    """

    def __init__(self) -> None:
        self.config: LlamaConfig | None = None  # what the tables were made for
        self.cos = torch.empty(0)  # (S, 1, D)
        self.sin = torch.empty(0)

    def get(self, config: LlamaConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of at least the positions below `length`, (S, 1, D) each with S >= length."""
        if not self._fit(config, length, device):
            num_positions = length
            if not is_dynamic(config):  # room to grow, within the context
                num_positions = max(length, min(config.max_seq_len, 2 * length))
            cos, sin = rope_tables(config, num_positions)
            self.config = config
            self.cos = cos.to(device)
            self.sin = sin.to(device)
        return self.cos, self.sin

    def _fit(self, config: LlamaConfig, length: int, device: torch.device) -> bool:
        if self.config != config or self.cos.device != device:
            return False
        if is_dynamic(config):
            return len(self.cos) == length
        return len(self.cos) >= length
