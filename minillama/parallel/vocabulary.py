"""Loss and logits of a vocabulary whose rows are cut over tensor ranks, without padding.

A rank has some rows of the head (V, C), and so some columns z of the logits. The loss of a position
needs three numbers of all columns, and no logits are sent:

    top     = maximum of z                            maximum over ranks
    total   = sum of exp(z - top)                     sum over ranks
    chosen  = z[label] - top                          from the rank that has the label's row
    loss    = log(total) - chosen

    d       = exp(z - top) / total - onehot(label)    own columns
    dh      = d W                                     the caller sums it over ranks
    dW      = d^T h                                   own rows

As in `ops.fused_loss`, positions are processed in chunks and the gradients are computed in forward,
so a rank has no more than a chunk of its logits.

Shapes: V vocabulary, C model width, N positions, V_r rows of this rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama import comm, ops
from minillama.comm import Mesh
from minillama.ops import IGNORE
from minillama.ops.fused_loss import chunk_size


@dataclass(frozen=True)
class Vocabulary:
    """How the rows of a vocabulary are divided among tensor ranks."""

    mesh: Mesh
    rows: tuple[int, ...]  # number of rows of each rank; at least one

    def own_rows(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The row of each token on this rank, 0 for a token of another rank; and which are own."""
        first = sum(self.rows[: self.mesh.rank])
        index = tokens - first
        is_own = (index >= 0) & (index < self.rows[self.mesh.rank])
        return index.masked_fill(~is_own, 0), is_own


class JoinLogits(torch.autograd.Function):
    """The logits of the whole vocabulary on every rank, (..., V), from each rank's (..., V_r)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, vocabulary: Vocabulary) -> Tensor:
        ctx.vocabulary = vocabulary
        mesh = vocabulary.mesh
        most_rows = max(vocabulary.rows)
        padded = F.pad(logits, (0, most_rows - logits.shape[-1]))  # (..., most_rows)
        gathered = comm.all_gather(mesh, padded.flatten()).view(mesh.size, *padded.shape)
        parts = []
        for part, num_rows in zip(gathered, vocabulary.rows, strict=True):
            parts.append(part[..., :num_rows])
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor, None]:
        """Every rank has the gradient of all logits, and takes that of its own."""
        vocabulary = ctx.vocabulary
        return dlogits.split(vocabulary.rows, dim=-1)[vocabulary.mesh.rank], None


class _LinearCrossEntropy(torch.autograd.Function):
    """z, exp(z), p and d share one buffer. hidden (N, C), weight (V_r, C), labels (N,)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, vocabulary: Vocabulary
    ) -> Tensor:
        needs_dh, needs_dw = ctx.needs_input_grad[:2]
        mesh = vocabulary.mesh
        weight32 = weight.float()
        targets = (labels != IGNORE).nonzero().squeeze(1)  # positions that have a label
        # Every rank must have the same chunks, so they follow from the rank with the most rows.
        chunk = chunk_size(len(targets), max(vocabulary.rows), weight.shape[1])
        buffer = torch.empty(chunk, len(weight), dtype=torch.float32, device=weight.device)
        loss = torch.zeros((), dtype=torch.float32, device=weight.device)
        dh = torch.zeros_like(hidden) if needs_dh else None
        dw = torch.zeros_like(weight32) if needs_dw else None
        for rows in targets.split(max(1, chunk)):
            h = hidden[rows].float()  # (chunk, C)
            own_row, is_own = vocabulary.own_rows(labels[rows])  # (chunk,) each
            own_row = own_row.unsqueeze(1)  # (chunk, 1)
            z = torch.mm(h, weight32.T, out=buffer[: len(rows)])  # (chunk, V_r)
            top = comm.all_reduce_max(mesh, z.amax(1))  # (chunk,)
            z.sub_(top.unsqueeze(1))
            chosen = z.gather(1, own_row).squeeze(1).masked_fill(~is_own, 0.0)  # (chunk,)
            exp_z = z.exp_()
            sums = comm.all_reduce_sum(mesh, torch.stack((exp_z.sum(1), chosen)))  # (2, chunk)
            total, chosen = sums
            loss += (total.log() - chosen).sum()
            if not (needs_dh or needs_dw):
                continue
            p = exp_z.div_(total.unsqueeze(1))
            d = p.scatter_add_(1, own_row, -is_own.float().unsqueeze(1))  # p - onehot
            if dh is not None:
                dh[rows] = (d @ weight32).to(dh.dtype)
            if dw is not None:
                dw.addmm_(d.T, h)
        ctx.save_for_backward(dh, dw)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """In place, so autograd refuses a second backward."""
        dh, dw = ctx.saved_tensors
        if dh is not None:
            dh = dh.mul_(dloss)
        if dw is not None:
            dw = dw.mul_(dloss).to(ctx.dtype)
        return dh, dw, None, None


def linear_cross_entropy(
    vocabulary: Vocabulary, hidden: Tensor, weight: Tensor, labels: Tensor
) -> Tensor:
    """`ops.linear_cross_entropy` of the whole head; every rank gets the sum.

    hidden (..., C), weight (V_r, C), labels (...). The gradient of hidden is this rank's part of a
    sum over ranks. `--ops reference` computes it from the logits of the whole vocabulary.
    """
    if ops.linear_cross_entropy.choice == "reference":
        logits = JoinLogits.apply(F.linear(hidden.float(), weight.float()), vocabulary)
        labels = labels.flatten()
        return F.cross_entropy(logits.flatten(0, -2), labels, ignore_index=IGNORE, reduction="sum")
    return _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten(), vocabulary)
