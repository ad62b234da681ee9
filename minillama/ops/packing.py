"""Documents end to end in one run of tokens: the only form of a batch, so that no padding is ever computed on.

    tokens     a a a a a | b b | c c c c          lengths (5, 2, 4)
    positions  0 1 2 3 4   0 1   0 1 2 3          they restart, and no document sees another

Everything but attention works on the run as it is. Attention wants rows: documents of like length become the rows of one call,
padded on the right, where causality hides the padding from every real query.

    group 1    a a a a a       slots  0 1 2 3 4  7 8 9 10 10   5 6     (the second 10 is a hole: c's last token, unused)
               c c c c ·       back   0 1 2 3 4  10 11  5 6 7 8
    group 2    b b
"""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    slots: Tensor  # the token in each slot of the padded rows; a hole repeats its document's last token
    back: Tensor  # the slot of each token: slots[back] is 0, 1, 2, …
    holes: Tensor  # the slots that are padding


class Documents:
    """The lengths of the documents in a run of sum(lengths) tokens, and the index tensors that follow from them."""

    def __init__(self, lengths: list[int], device: torch.device | str = "cpu") -> None:
        self.lengths = lengths
        self.device = torch.device(device)

    @cached_property
    def positions(self) -> Tensor:
        """The place of each token in its document, (sum(lengths),) int64."""
        return torch.cat([torch.arange(length) for length in self.lengths]).to(self.device)

    @cached_property
    def groups(self) -> list[list[int]]:
        """Documents (by number) whose attention is computed together: lengths within an eighth, plus 16, of the longest."""
        order = sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i])
        groups: list[list[int]] = []
        for i in order:
            longest = self.lengths[groups[-1][0]] if groups else 0
            if not groups or longest - self.lengths[i] > 16 + longest // 8:
                groups.append([])
            groups[-1].append(i)
        return groups

    @property
    def group_shapes(self) -> list[tuple[int, int]]:
        """(documents, padded length) of each group."""
        return [(len(group), self.lengths[group[0]]) for group in self.groups]

    @cached_property
    def layout(self) -> Layout:
        lengths = torch.tensor(self.lengths)
        starts, slots, real = lengths.cumsum(0) - lengths, [], []
        for group, (_, padded) in zip(self.groups, self.group_shapes, strict=True):
            length, place = lengths[group].unsqueeze(1), torch.arange(padded)
            slots.append((starts[group].unsqueeze(1) + torch.minimum(place, length - 1)).flatten())
            real.append((place < length).flatten())
        all_slots, is_real = torch.cat(slots), torch.cat(real)
        back = torch.empty(int(lengths.sum()), dtype=torch.int64)
        back[all_slots[is_real]] = is_real.nonzero().squeeze(1)
        return Layout(
            all_slots.to(self.device),
            back.to(self.device),
            (~is_real).nonzero().squeeze(1).to(self.device),
        )
