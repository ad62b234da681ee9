"""The key/value cache: what attention needs of the tokens already seen, kept instead of computed again.

Storage for all texts is made once, (B, K, capacity, D) a layer for keys and as much for values; a step writes T positions of every
row and reads all so far. Keys and values of shared heads are stored once, never expanded.

    extend(T)        the next T tokens of every row: tokens (B, T). Rows of unlike length each stand at their own place
    extend(T, rows)  the next T tokens of some rows only: a long prompt is read chunk by chunk in its own row
    pack(lengths)    whole prompts end to end, tokens (1, sum of lengths), the form in which no padding is computed; each lands in its row

A row that is done is dropped: the last row moves into its place, and the next step is a row smaller.
"""

import torch
from torch import Tensor

from minillama.llama_config import LlamaConfig
from minillama.ops import Documents


class Cache:
    """Keys and values of every layer for up to `capacity` positions of B texts. config: of the model, or with other rotary settings."""

    def __init__(
        self,
        config: LlamaConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (config.n_layers, batch, config.n_kv_heads, capacity, config.head_dim)
        self.keys = torch.zeros(
            shape, dtype=dtype, device=device
        )  # not empty: what a mask hides must still be a number
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.config, self.capacity, self.filled = config, capacity, [0] * batch
        self.places = torch.arange(capacity, device=device)
        self.positions, self.lengths = self.places[:0], None

    def extend(self, count: int, rows: slice = slice(None)) -> "Cache":
        """Make room for the next `count` tokens of `rows`; then one forward of the model fills it."""
        filled = self.filled[rows] = [length + count for length in self.filled[rows]]
        longest = max(filled)
        assert longest <= self.capacity, (longest, count, self.capacity)
        self._rows, self._row, self._longest = rows, None, longest
        if min(filled) == longest:
            self.positions, self.lengths = self.places[longest - count : longest], None
        else:
            self.lengths = torch.tensor(filled, device=self.places.device)
            self.positions = (self.lengths - count).unsqueeze(1) + self.places[:count]  # (B, T)
            self._row = torch.arange(len(filled), device=self.places.device).unsqueeze(1)
        return self

    def pack(self, documents: Documents, rows: list[int]) -> "Cache":
        """Make room for the first tokens of `rows`: documents end to end, one for each row."""
        for row, length in zip(rows, documents.lengths, strict=True):
            self.filled[row] = length
        self.positions, self.lengths = documents.positions.unsqueeze(0), None
        self._rows, self._longest = slice(None), None
        self._row = torch.repeat_interleave(torch.tensor(rows), torch.tensor(documents.lengths)).to(
            self.places.device
        )
        return self

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, (B, T, K, D) each; returns all so far, (B, S, K, D) each, in rows of unlike length with
        unwritten ends. Packed prompts see nothing but themselves, and come back as they are."""
        keys, values = (
            self.keys[layer, self._rows].transpose(1, 2),
            self.values[layer, self._rows].transpose(1, 2),
        )  # (B, capacity, K, D)
        if self._row is None:
            start, count = self._longest - k.shape[1], k.shape[1]
            keys.narrow(1, start, count).copy_(k)
            values.narrow(1, start, count).copy_(v)
        else:
            keys[self._row, self.positions] = k
            values[self._row, self.positions] = v
        return (
            (k, v)
            if self._longest is None
            else (keys.narrow(1, 0, self._longest), values.narrow(1, 0, self._longest))
        )

    def copy(self, source: list[int], target: list[int], start: int = 0) -> None:
        """Make rows `target` equal to rows `source`, pair by pair, where they agree before `start` already."""
        end = max((self.filled[row] for row in source), default=0)
        for kept in (self.keys, self.values):
            kept[:, target, :, start:end] = kept[:, source, :, start:end]
        for a, b in zip(source, target, strict=True):
            self.filled[b] = self.filled[a]

    def drop(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        self.copy([len(self.filled) - 1], [row])
        self.filled.pop()
        self.keys, self.values = self.keys[:, :-1], self.values[:, :-1]
