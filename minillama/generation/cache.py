"""The key/value cache: keys and values of the tokens already read, so that they are computed once.

Storage for all sequences is made once: (B, K, capacity, D) for the keys of each layer, and as much
for the values, on the device of the layer. A step writes T positions of every row and reads all
positions so far. Key/value heads that groups of query heads share are stored once and never
expanded. A rank that holds a part of the heads stores those.

    extend(T)         the next T tokens of every row, (B, T); rows may be of different lengths
    extend(T, rows)   the next T tokens of some rows: a long prompt is read chunk by chunk
    pack(documents)   whole prompts end to end, (1, sum of lengths), without padding; each prompt
                      is stored in its own row

`drop` removes a finished row: the last row moves into its place.

Shapes: B rows, T new tokens, S positions so far, K key/value heads, D head size.
"""

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minillama.errors import UserError
from minillama.llama_config import LlamaConfig
from minillama.memory import most_usable_bytes
from minillama.model import Llama
from minillama.ops import Documents

ALL_ROWS = slice(None)


def refuse_too_large(num_bytes: int, what: str, device: torch.device) -> None:
    """Raise UserError if `what` needs more memory than there is."""
    usable = most_usable_bytes(device)
    if usable is not None and num_bytes > usable:
        raise UserError(
            f"{what} needs {num_bytes / 1e9:,.1f} GB, and {device} has {usable / 1e9:,.1f} GB; "
            "use a smaller --num_beams, --batch_size or --max_new_tokens"
        )


class LayerStorage(NamedTuple):
    """What a layer needs in the cache."""

    n_kv_heads: int  # that this rank holds
    device: torch.device

    @classmethod
    def of(cls, layer: nn.Module, head_dim: int) -> "LayerStorage":
        k_proj: Any = layer.get_submodule("self_attn.k_proj")
        return cls(k_proj.out_features // head_dim, k_proj.weight.device)


class Cache:
    """Keys and values of every layer for up to `capacity` positions of B sequences.

    config: the model's, or the same with other rotary settings.
    layers: what each layer stores.
    device: of the tokens.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        layers: list[LayerStorage],
        device: torch.device,
    ) -> None:
        self.keys: list[Tensor] = []  # by layer, (B, K, capacity, D) each
        self.values: list[Tensor] = []
        for layer in layers:
            shape = (batch, layer.n_kv_heads, capacity, config.head_dim)
            # zeros, not empty: what a mask hides must still be a finite number
            self.keys.append(torch.zeros(shape, dtype=dtype, device=layer.device))
            self.values.append(torch.zeros(shape, dtype=dtype, device=layer.device))
        self.config = config
        self.capacity = capacity
        self.filled = [0] * batch  # tokens in each row
        self.all_positions = torch.arange(capacity, device=device)
        # How the next forward pass writes; set by `extend` and `pack`.
        self.positions = self.all_positions[:0]  # of the new tokens: (T,) or (B, T)
        self.lengths: Tensor | None = None  # tokens in each row, (B,), if they differ
        self._rows = ALL_ROWS
        self._row_index: Tensor | None = None  # row of each new token, if positions differ
        self._start = 0  # position of the first new token, if it is the same in all rows
        self._longest: int | None = None  # tokens in the longest row; None: packed

    @classmethod
    def for_model(cls, model: Llama, config: LlamaConfig, batch: int, capacity: int) -> "Cache":
        """A cache with the dtype of the model's weights, each layer on the device of its own.

        Raises UserError if it is larger than the memory of a device.
        """
        weight = model.model.embed_tokens.weight  # the head's may be int8
        layers = [LayerStorage.of(layer, config.head_dim) for layer in model.model.layers]
        bytes_on: Counter[torch.device] = Counter()
        for layer in layers:
            elements = batch * layer.n_kv_heads * capacity * config.head_dim
            bytes_on[layer.device] += 2 * elements * weight.element_size()
        what = f"the cache of {batch:,} sequences of {capacity:,} tokens"
        for device, num_bytes in bytes_on.items():
            refuse_too_large(num_bytes, what, device)
        device = model.lm_head.weight.device  # new tokens come from the head
        return cls(config, batch, capacity, weight.dtype, layers, device)

    def extend(self, count: int, rows: slice = ALL_ROWS) -> "Cache":
        """Prepare for the next `count` tokens of `rows`, which one forward pass then stores.

        Returns the cache itself.
        """
        filled = [length + count for length in self.filled[rows]]
        self.filled[rows] = filled
        longest = max(filled)
        assert longest <= self.capacity, (longest, count, self.capacity)
        self._rows = rows
        self._start = longest - count
        self._longest = longest
        if min(filled) == longest:
            self.positions = self.all_positions[self._start : longest]  # (T,)
            self.lengths = None
            self._row_index = None
        else:
            device = self.all_positions.device
            self.lengths = torch.tensor(filled, device=device)  # (B,)
            first = (self.lengths - count).unsqueeze(1)  # (B, 1)
            self.positions = first + self.all_positions[:count]  # (B, T)
            self._row_index = torch.arange(len(filled), device=device).unsqueeze(1)  # (B, 1)
        return self

    def pack(self, documents: Documents, rows: list[int]) -> "Cache":
        """Prepare for whole prompts end to end: document i is stored in row rows[i].

        Returns the cache itself.
        """
        for row, length in zip(rows, documents.lengths, strict=True):
            self.filled[row] = length
        self.positions = documents.positions.unsqueeze(0)  # (1, T)
        self.lengths = None
        lengths = torch.tensor(documents.lengths)
        row_index = torch.repeat_interleave(torch.tensor(rows), lengths)  # (T,)
        self._row_index = row_index.to(self.all_positions.device)
        self._rows = ALL_ROWS
        self._longest = None
        return self

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, (B, T, K, D) each; returns all so far, (B, S, K, D).

        Rows shorter than S end in positions that were never written. Packed prompts see only
        themselves, so for them k and v are returned as they are.
        """
        keys = self.keys[layer][self._rows].transpose(1, 2)  # (B, capacity, K, D)
        values = self.values[layer][self._rows].transpose(1, 2)  # (B, capacity, K, D)
        if self._row_index is not None:
            row_index = self._row_index.to(k.device)
            positions = self.positions.to(k.device)
            keys[row_index, positions] = k
            values[row_index, positions] = v
        else:
            count = k.shape[1]
            keys.narrow(1, self._start, count).copy_(k)
            values.narrow(1, self._start, count).copy_(v)
        if self._longest is None:
            return k, v
        return keys.narrow(1, 0, self._longest), values.narrow(1, 0, self._longest)

    def copy(self, sources: list[int], targets: list[int], start: int = 0) -> None:
        """Copy row sources[i] to row targets[i]; positions before `start` are equal already."""
        if not sources:
            return
        end = max(self.filled[row] for row in sources)
        for stored in (*self.keys, *self.values):
            stored[targets, :, start:end] = stored[sources, :, start:end]
        for source, target in zip(sources, targets, strict=True):
            self.filled[target] = self.filled[source]

    def drop(self, row: int) -> None:
        """Remove a row; the last one takes its place."""
        last = len(self.filled) - 1
        self.copy([last], [row])
        self.filled.pop()
        self.keys = [keys[:-1] for keys in self.keys]
        self.values = [values[:-1] for values in self.values]
