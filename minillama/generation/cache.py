"""The key/value cache: what attention needs of the tokens already seen, kept instead of computed again.

Storage for the whole text is made once, (B, capacity, K, D) a layer for keys and as much for values; a step writes T positions and
reads all so far. Keys and values of shared heads are stored once, never expanded.
"""

import torch
from torch import Tensor

from minillama.architecture import LlamaConfig


class Cache:
    """Keys and values of every layer for up to `capacity` positions of B texts."""

    def __init__(self, config: LlamaConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.n_layers, batch, capacity, config.n_kv_heads, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.capacity, self.length, self.positions = capacity, 0, torch.arange(0, device=device)

    def extend(self, count: int) -> "Cache":
        """Make room for the next `count` tokens; then one forward of the model fills it."""
        assert self.length + count <= self.capacity, (self.length, count, self.capacity)
        self.positions = torch.arange(self.length, self.length + count, device=self.keys.device)
        self.length += count
        return self

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, (B, T, K, D) each; returns all so far, (B, S, K, D) each."""
        start = self.length - k.shape[1]
        self.keys[layer, :, start:self.length] = k
        self.values[layer, :, start:self.length] = v
        return self.keys[layer, :, :self.length], self.values[layer, :, :self.length]
