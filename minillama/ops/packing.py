"""Documents end to end in one sequence of tokens. Every batch is one, so there is no padding.

    tokens      a a a a a | b b | c c c c           lengths (5, 2, 4)
    positions   0 1 2 3 4   0 1   0 1 2 3           they restart, and no document sees another

All layers but attention work on the tokens as they are. Attention needs one row per document.
Documents of similar length form a group: a batch of rows, padded on the right to the longest.
Causality hides the padding from the tokens. Two documents, a a a and b b, as one group of two rows
of three slots:

    tokens             a0 a1 a2 b0 b1               index 0 1 2 3 4
    rows               a0 a1 a2                     slot  0 1 2
                       b0 b1 ..                     slot  3 4 5, of which 5 is padding

    gather_index       0 1 2 3 4 4      the token in each slot; padding repeats the last, here b1
    inverse_index      0 1 2 3 4        the slot of each token
    padding            5                the slots without a token

`ops.fused_attention` gathers q, k and v into rows, computes each group, and gathers the tokens
back.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Documents whose attention is computed together, as rows padded to the longest of them."""

    documents: list[int]  # indices into Documents.lengths
    length: int  # of the longest, and so of every row

    @property
    def num_slots(self) -> int:
        return len(self.documents) * self.length


class Layout(NamedTuple):
    """Where the tokens stand in the padded rows of all groups. The slots are numbered through."""

    # (slots,): the token in each slot; padding repeats its document's last token
    gather_index: Tensor
    # (tokens,): the slot of each token, gather_index[inverse_index] = 0, 1, 2, …
    inverse_index: Tensor
    padding: Tensor  # the slots that hold no token


class Documents:
    """The lengths of the documents in a sequence of tokens, and the indices that follow from
    them."""

    def __init__(self, lengths: list[int], device: torch.device | str = "cpu") -> None:
        self.lengths = lengths
        self.device = torch.device(device)

    @cached_property
    def positions(self) -> Tensor:
        """The position of each token in its document, (sum(lengths),) int64."""
        return torch.cat([torch.arange(length) for length in self.lengths]).to(self.device)

    @cached_property
    def groups(self) -> list[Group]:
        """The documents from the longest to the shortest, cut when padding would be too much.

        A row has at most 16 + length // 8 slots of padding.
        """
        longest_first = sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i])
        groups: list[Group] = []
        for document in longest_first:
            length = self.lengths[document]
            if not groups or not _is_similar(length, groups[-1].length):
                groups.append(Group(documents=[], length=length))
            groups[-1].documents.append(document)
        return groups

    @cached_property
    def layout(self) -> Layout:
        lengths = torch.tensor(self.lengths)
        starts = lengths.cumsum(0) - lengths  # the index of each document's first token
        index_parts = []
        token_parts = []
        for group in self.groups:
            row_lengths = lengths[group.documents].unsqueeze(1)  # (rows, 1)
            row_starts = starts[group.documents].unsqueeze(1)
            position = torch.arange(group.length)
            index = row_starts + torch.minimum(position, row_lengths - 1)  # (rows, length)
            index_parts.append(index.flatten())
            token_parts.append((position < row_lengths).flatten())
        gather_index = torch.cat(index_parts)
        holds_token = torch.cat(token_parts)

        inverse_index = torch.empty(sum(self.lengths), dtype=torch.int64)
        inverse_index[gather_index[holds_token]] = holds_token.nonzero().squeeze(1)
        padding = (~holds_token).nonzero().squeeze(1)
        return Layout(
            gather_index.to(self.device), inverse_index.to(self.device), padding.to(self.device)
        )


def _is_similar(length: int, longest: int) -> bool:
    return longest - length <= 16 + longest // 8
