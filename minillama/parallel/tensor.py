"""Tensor parallelism (Shoeybi et al. 2019): ranks divide the work inside every layer.

All ranks of a tensor line read the same tokens. Each computes some heads of the attention and some
columns of the MLP; `parallel.shards` has the table. Two functions connect the ranks:

    x ── f ──▶ q, k, v rows ──▶ attention of own heads ──▶ o columns ──── g ──▶ + bias of o
    x ── f ──▶ gate, up rows ─▶ swiglu ───────────────────▶ down columns ─ g ──▶ + bias of down

              forward                         backward
    f         the same x for every rank       sum of the ranks' dx        `CopyToRanks`
    g         sum of the ranks' y             the same dy for every rank  `SumOverRanks`

Each is the other one's backward. Outside the blocks, x and its gradient are equal on all ranks, so
norms and the residual stream need no communication. A layer sends two sums forward and two
backward, each as large as x.

The vocabulary is cut too. A rank embeds the tokens whose rows it has, as 0 the others, and g sums.
The head computes the logits of own rows behind an f; `parallel.vocabulary` has the loss.

`parallelise` changes a finished `Llama` from outside, adapters included. `cut_parameters` keeps
this rank's part of each tensor; a model that was loaded in parts needs `connect_ranks` alone.

Left out: sequence parallelism, which cuts norms and the residual stream along the tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillama import comm
from minillama.comm import Mesh
from minillama.errors import UserError
from minillama.llama_config import LlamaConfig
from minillama.parallel.shards import (
    COLUMNS,
    MODULE_AXES,
    axis_of,
    check_tensor_parallel,
    cut,
)
from minillama.parallel.vocabulary import JoinLogits, Vocabulary, linear_cross_entropy

BLOCKS = ("self_attn", "mlp")


def parallelise(model: nn.Module, mesh: Mesh) -> None:
    """Keep this rank's part of a whole `Llama`, and connect it with the parts of the other ranks.

    mesh: the line of tensor ranks. With one rank nothing changes.
    """
    cut_parameters(model, mesh)
    connect_ranks(model, mesh)


def cut_sizes(config: LlamaConfig) -> dict[str, int]:
    """What tensor ranks cut into equal parts, by name."""
    return {"n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads, "ffn_dim": config.ffn_dim}


def refuse_uncuttable(config: LlamaConfig, ranks: int) -> None:
    """Raise UserError unless `ranks` tensor ranks can divide a model of this shape."""
    check_tensor_parallel(cut_sizes(config), ranks)
    if config.vocab_size < ranks:
        raise UserError(
            f"vocab_size = {config.vocab_size} cannot be cut over {ranks} tensor-parallel ranks; "
            f"use at most {config.vocab_size}"
        )


@torch.no_grad()
def cut_parameters(model: nn.Module, mesh: Mesh) -> None:
    """Replace each parameter by this rank's part of it, in memory of its own."""
    if mesh.size == 1:
        return
    for name, parameter in model.named_parameters():
        part = cut(parameter.data, axis_of(name), mesh.rank, mesh.size)
        parameter.data = part.clone(memory_format=torch.contiguous_format)
    for module in model.modules():
        set_sizes(module)


def set_sizes(module: nn.Module) -> None:
    """Let a linear or an embedding state the sizes of the weight that it has."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings = len(module.weight)


def connect_ranks(model: nn.Module, mesh: Mesh) -> None:
    """Let a model that holds this rank's part of each parameter compute what the whole computes.

    Call it once, after adapters are in place: it changes the modules that are there.
    """
    if mesh.size == 1:
        return
    for name, module in list(model.named_modules()):
        kind = name.rpartition(".")[2]
        if kind in BLOCKS:
            module.register_forward_pre_hook(partial(_copy_input_to_ranks, mesh))
        elif kind == "embed_tokens":
            connect_embedding(module, divide_vocabulary(module, mesh))
        elif kind == "lm_head":
            connect_head(module, divide_vocabulary(module, mesh))
        elif MODULE_AXES.get(kind) == COLUMNS:
            connect_last_linear(module, mesh)


class CopyToRanks(torch.autograd.Function):
    """f: every rank reads the same x. So the gradient of x is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        dx = dy.clone(memory_format=torch.contiguous_format)  # others may read dy too
        return comm.all_reduce_sum(ctx.mesh, dx), None


class SumOverRanks(torch.autograd.Function):
    """g: the sum of the ranks' y. Each of them has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, mesh: Mesh) -> Tensor:
        total = y.clone(memory_format=torch.contiguous_format)  # autograd may have saved y
        return comm.all_reduce_sum(mesh, total)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


def _copy_input_to_ranks(mesh: Mesh, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook: f on the first argument of a block."""
    return (CopyToRanks.apply(args[0], mesh), *args[1:])


def connect_last_linear(linear: nn.Module, mesh: Mesh) -> None:
    """Let o_proj or down_proj, of which each rank has some columns, return the sum over ranks.

    An adapter's product is part of the sum. Its dropout acts on the columns that the rank has.
    """
    linear.forward = partial(_sum_of_products, linear, mesh)
    dropout = getattr(linear, "dropout", None)
    if isinstance(dropout, nn.Dropout):
        linear.dropout = CutDropout(dropout.p, mesh)


def _sum_of_products(linear: Any, mesh: Mesh, x: Tensor) -> Tensor:
    """x W^T + b. x (..., in / N), `linear.product` (..., out).

    The bias, which every rank has, is added once: after the sum.
    """
    y = SumOverRanks.apply(linear.product(x), mesh)
    return y if linear.bias is None else y + linear.bias


class CutDropout(nn.Dropout):
    """Dropout of an input of which each rank has some columns.

    All ranks draw the mask of the whole input, and each uses its columns of it. So the result does
    not depend on the number of ranks, as long as their generators are in the same state.
    """

    def __init__(self, p: float, mesh: Mesh) -> None:
        super().__init__(p)
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        width = x.shape[-1]
        ones = x.new_ones(*x.shape[:-1], width * self.mesh.size)
        mask = F.dropout(ones, self.p)  # 0, or 1 / (1 - p)
        return x * mask.narrow(-1, width * self.mesh.rank, width)


def divide_vocabulary(module: Any, mesh: Mesh) -> Vocabulary:
    """How many rows of an embedding or a head each rank has."""
    return Vocabulary(mesh, tuple(comm.gather_objects(mesh, len(module.weight))))


def connect_embedding(embedding: nn.Module, vocabulary: Vocabulary) -> None:
    """Let an embedding, of which each rank has some rows, return the whole one's vectors."""
    embedding.forward = partial(_embed_own_tokens, embedding.forward, vocabulary)


def _embed_own_tokens(
    embed: Callable[[Tensor], Tensor], vocabulary: Vocabulary, tokens: Tensor
) -> Tensor:
    """The vectors of tokens (B, T), (B, T, C). embed: that of own rows, by their index."""
    index, is_own = vocabulary.own_rows(tokens)
    x = embed(index).masked_fill(~is_own.unsqueeze(-1), 0.0)
    return SumOverRanks.apply(x, vocabulary.mesh)


def connect_head(head: Any, vocabulary: Vocabulary) -> None:
    """Let a head, of which each rank has some rows, return the logits and the loss of all rows."""
    head.forward = partial(_join_logits, head.forward, vocabulary)
    head.loss_sum = partial(_loss_sum, head.loss_sum, vocabulary)


def _join_logits(
    own_logits: Callable[[Tensor], Tensor], vocabulary: Vocabulary, hidden: Tensor
) -> Tensor:
    """hidden (..., C) -> logits (..., V)."""
    x = CopyToRanks.apply(hidden, vocabulary.mesh)
    return JoinLogits.apply(own_logits(x), vocabulary)


def _loss_sum(
    loss_sum: Callable[..., Tensor], vocabulary: Vocabulary, hidden: Tensor, labels: Tensor
) -> Tensor:
    """The head's loss_sum (`model.Linear.loss_sum`) with the cross entropy of all ranks' rows."""
    x = CopyToRanks.apply(hidden, vocabulary.mesh)
    return loss_sum(x, labels, cross_entropy=partial(linear_cross_entropy, vocabulary))
