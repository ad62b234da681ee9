"""ZeRO: one flat vector, any stage, any number of ranks."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from minillama import comm
from minillama.comm import Mesh
from minillama.errors import UserError
from minillama.grid import make_grid
from minillama.parallel import zero
from minillama.parallel.sharded_optimizer import ShardedOptimizer
from minillama.parallel.zero import CHUNK
from minillama.train_config import TrainConfig
from tests.conftest import random_model, random_tokens
from tests.ranks import run_on_ranks

MICRO_BATCHES = 6
LARGE = {"vocab_size": 1000}  # 57,648 parameters: three chunks of 16,384 and a half
SETTINGS = TrainConfig(adam_beta2=0.95, weight_decay=0.1, gradient_accumulation_steps=2)


def settings_of(stage: int, exact: bool = False, **changes) -> TrainConfig:
    return replace(SETTINGS, zero_stage=stage, reduction="exact" if exact else "fast", **changes)


def micro_batches(step: int, count: int) -> list[torch.Tensor]:
    return [random_tokens(1, 8 + i, seed=100 * step + i) for i in range(count)]


def train(
    stage: int,
    exact: bool,
    dtype: torch.dtype = torch.float32,
    steps: int = 3,
    bucket_elements: int = 3000,
    **model,
):
    """Three updates on this rank's share of fixed global batches, the last one short.

    Returns (weights, norms, state, elements sent per step). The model has more than three chunks of
    parameters, so with four ranks every rank owns some.
    """
    torch.set_num_threads(1)
    with comm.start("cpu", timeout_minutes=1) as mesh:
        net = random_model(**LARGE, **model).to(dtype)
        optimizer = ShardedOptimizer(
            net.named_parameters(),
            make_grid(mesh),
            settings_of(stage, exact, bucket_elements=bucket_elements),
        )
        norms = []
        for step in range(steps):
            batches = micro_batches(step, MICRO_BATCHES if step < steps - 1 else MICRO_BATCHES - 1)
            optimizer.zero_grad()
            for first in range(0, len(batches), mesh.size):
                mine = batches[first + mesh.rank] if first + mesh.rank < len(batches) else None
                loss = None if mine is None else net.loss_sum(mine, mine.roll(-1, 1)) / 60
                optimizer.backward(loss, min(mesh.size, len(batches) - first))
            norms.append(optimizer.step(1e-2, max_norm=0.5)[0])
        part = optimizer.vectors[0]
        state = {
            name: comm.gather_objects(mesh, tensor.numpy().copy())
            for name, tensor in part.state().items()
        }
        return (
            {name: p.detach().clone().float().numpy() for name, p in net.named_parameters()},
            norms,
            {
                name: [x for piece in pieces for x in piece.tolist()]
                for name, pieces in state.items()
            },
            mesh.elements_sent / steps,
        )


def everyones(size: int, *arguments):
    return run_on_ranks(size, train, *arguments) if size > 1 else [train(*arguments)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_exact_reduction_gives_the_same_bytes_on_any_stage_and_number_of_ranks(dtype):
    """Floating-point sums depend on their order, so the order is a fixed tree of micro-batches."""
    weights, norms, state, _ = train(0, True, dtype)
    for size, stage in [(1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (4, 0), (4, 1), (4, 2)]:
        for found_weights, found_norms, found_state, _ in everyones(size, stage, True, dtype):
            assert found_norms == norms, (size, stage)
            assert found_state == state, (size, stage)
            assert all((found_weights[name] == weights[name]).all() for name in weights), (
                size,
                stage,
            )


@pytest.mark.parametrize("size, stage", [(1, 2), (2, 0), (2, 1), (2, 2), (3, 1), (3, 2)])
def test_the_fast_reduction_differs_by_rounding_only(size, stage):
    weights, norms, _, _ = train(0, True)
    found_weights, found_norms, _, _ = everyones(size, stage, False)[0]
    assert found_norms == pytest.approx(norms, rel=1e-5)
    assert (
        max(abs(found_weights[name] - weights[name]).max() for name in weights) < 2e-3
    )  # a tenth of an update, where v is near 0


@pytest.mark.parametrize("chunk", [zero.CPU_UPDATE_CHUNK, 1000])
def test_it_is_adamw_with_the_norm_of_the_whole_gradient(chunk, monkeypatch):
    """Three updates against torch's AdamW and clip_grad_norm_, decay on matrices only."""
    monkeypatch.setattr(zero, "CPU_UPDATE_CHUNK", chunk)
    net = random_model(**LARGE)
    groups = [
        {
            "params": [p for p in net.parameters() if (p.ndim > 1) == matrix],
            "weight_decay": 0.1 * matrix,
        }
        for matrix in (True, False)
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    norms = []
    for step in range(3):
        adamw.zero_grad()
        for batch in micro_batches(step, MICRO_BATCHES if step < 2 else MICRO_BATCHES - 1):
            (net.loss_sum(batch, batch.roll(-1, 1)) / 60).backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), 0.5)))
        adamw.step()
    weights, found_norms, _, _ = train(0, False)
    assert found_norms == pytest.approx(norms, rel=1e-5)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(
            torch.from_numpy(weights[name]), parameter.detach(), rtol=1e-4, atol=2e-5
        )


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_frozen_tied_and_unused_parameters_need_nothing_special(stage):
    def run():
        with comm.start("cpu", timeout_minutes=1) as mesh:
            net = random_model(tie_embeddings=True)
            net.model.layers[0].mlp.requires_grad_(False)
            net.unused = nn.Parameter(torch.ones(7, 3))
            before = net.model.layers[0].mlp.up_proj.weight.clone()
            optimizer = ShardedOptimizer(
                net.named_parameters(),
                make_grid(mesh),
                settings_of(stage, bucket_elements=500, weight_decay=0.0),
            )
            for step in range(2):
                optimizer.zero_grad()
                batch = random_tokens(1, 9, seed=step)
                optimizer.backward(net.loss_sum(batch, batch.roll(-1, 1)), mesh.size)
                optimizer.step(1e-2, 1.0)
            assert torch.equal(net.model.layers[0].mlp.up_proj.weight, before)
            assert torch.equal(net.unused, torch.ones(7, 3))
            assert net.lm_head.weight is net.model.embed_tokens.weight
            return [p.detach().numpy().copy() for p in net.parameters()]

    alone, shared = run_on_ranks(1, run)[0], run_on_ranks(2, run)
    assert all((a == b).all() for a, b in zip(*shared, strict=True))
    assert (
        max(abs(a - b).max() for a, b in zip(alone, shared[0], strict=True)) < 1e-3
    )  # both ranks saw the same batch: the same direction


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_parameters_of_two_dtypes_meet_their_peers_where_a_rank_has_no_micro_batch(stage, exact):
    """Backward completes the head, an fp32 factor and the embedding in turn.

    A rank that runs no backward must reduce them in the same order.
    """

    def run():
        with comm.start("cpu", timeout_minutes=1) as mesh:
            generator = torch.Generator().manual_seed(0)
            embed, factor, head = (
                nn.Parameter(torch.randn(40, 40, generator=generator).to(dtype))
                for dtype in (torch.bfloat16, torch.float32, torch.bfloat16)
            )
            optimizer = ShardedOptimizer(
                [("embed", embed), ("factor", factor), ("head", head)],
                make_grid(mesh),
                settings_of(stage, exact, bucket_elements=1000),
            )
            for batches in (3, 2, 1):
                optimizer.zero_grad()
                for first in range(0, batches, mesh.size):
                    loss = (
                        ((embed.float() * (first + mesh.rank + 1)) @ factor).bfloat16() @ head
                    ).float().square().sum() / 1e4
                    optimizer.backward(
                        loss if first + mesh.rank < batches else None,
                        min(mesh.size, batches - first),
                    )
                optimizer.step(1e-2, 1.0)
            return [p.detach().float().numpy().copy() for p in (embed, factor, head)]

    alone, shared = run_on_ranks(1, run)[0], run_on_ranks(2, run)
    assert all((a == b).all() for a, b in zip(*shared, strict=True))
    assert max(abs(a - b).max() for a, b in zip(alone, shared[0], strict=True)) < 0.05


@pytest.mark.parametrize(
    "size, stage, expected",
    [(2, 0, 2 / 2), (2, 1, 2 / 2), (2, 2, 4 / 2), (4, 1, 2 * 3 / 4), (4, 2, 3 * 3 / 4)],
)
def test_what_is_sent_is_what_the_theory_says(size, stage, expected):
    """2Ψ(N-1)/N elements a step; at stage 2, with A micro-batches a rank, (A+1)Ψ(N-1)/N."""
    sent = [traffic for _, _, _, traffic in run_on_ranks(size, train, stage, False)]
    total = sum(p.numel() for p in random_model(**LARGE).parameters())
    padded = (
        -(-total // (CHUNK * size)) * CHUNK * size
    )  # weights are gathered over whole slices, and of each the squared norm
    extra = 0 if stage == 0 else (padded - total + size) * (size - 1) / size
    assert sum(sent) / size == pytest.approx(expected * total + extra, rel=1e-6)


@pytest.mark.parametrize("dtype, width", [(torch.float32, 4), (torch.bfloat16, 2)], ids=str)
@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_state_is_as_large_as_the_table_says(size, stage, dtype, width, accumulates, monkeypatch):
    """Bytes per parameter of a 16-bit model.

    16 at stage 0, 4 + 12/N at stage 1, 2 + 14/N at stage 2 (2 + 16/N if it accumulates in fp32).
    """
    monkeypatch.setattr(comm, "reduce_to", lambda mesh, tensor, **_: lambda: tensor)
    net = nn.Linear(4 * CHUNK, 8, bias=False, dtype=dtype)
    optimizer = ShardedOptimizer(
        net.named_parameters(),
        make_grid(Mesh(rank=0, size=size)),
        settings_of(stage, gradient_accumulation_steps=1 + accumulates),
    )
    optimizer.backward(net(torch.ones(1, 4 * CHUNK, dtype=dtype)).sum(), size)
    part = optimizer.vectors[0]
    gradients = [part.gradients.sum if stage == 2 else part.gradients.vector]
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (part.weights, part.master, part.m, part.v, *gradients)
    }
    master, gradient = (4 if width == 2 else 0), (4 if accumulates else width)
    optimizer_share, gradient_share = (1 if stage == 0 else size), (size if stage == 2 else 1)
    expected = width + (master + 8) / optimizer_share + gradient / gradient_share
    assert sum(held.values()) / net.weight.numel() == expected


def test_three_ranks_cannot_be_exact():
    with pytest.raises(UserError, match="1, 2, 4, 8"):
        ShardedOptimizer(
            random_model().named_parameters(),
            make_grid(Mesh(rank=0, size=3)),
            settings_of(0, exact=True),
        )
