"""The learning rate of each step, by transformers' rule: warm-up begins with an update at 0.

peak        .----.            1. warm-up: a straight line from 0 to the peak
           /      `.          2. constant: stay there
low       /         `--       3. linear or cosine: down to min_learning_rate
        0  warm-up   total
"""

import math

from minillama.train_config import TrainConfig


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The rate of update `step`, counted from 0, of `total` updates."""
    kind = config.lr_scheduler_type
    peak = config.learning_rate
    warmup = config.warmup_steps or math.ceil(total * config.warmup_ratio)
    if kind != "constant" and step < warmup:
        return peak * step / warmup
    if kind.startswith("constant"):
        return peak
    low = config.min_learning_rate
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    share = 1.0 - progress  # linear
    if kind == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return low + (peak - low) * share
