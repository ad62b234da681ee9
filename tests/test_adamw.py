"""The flat AdamW is torch's: clipping, decay of matrices, fp32 masters of 16-bit weights."""

import pytest
import torch

from minillama.comm import Mesh
from minillama.grid import make_grid
from minillama.ops import reference
from minillama.parallel.sharded_optimizer import ShardedOptimizer
from minillama.parallel.zero import CHUNK
from minillama.train_config import TrainConfig
from tests.conftest import random_model
from tests.runs import flat_gradient, flat_weights, loss_of, torch_adamw

MESH = Mesh()


def flat_adamw(model: torch.nn.Module, weight_decay: float = 0.1) -> ShardedOptimizer:
    return ShardedOptimizer(
        model.named_parameters(),
        make_grid(MESH),
        TrainConfig(adam_beta2=0.95, weight_decay=weight_decay, gradient_accumulation_steps=2),
    )


def test_the_flat_optimizer_is_torchs_with_clipping_and_decay_on_matrices_only() -> None:
    ours, theirs = (random_model(attention_bias=True, mlp_bias=True) for _ in range(2))
    flat, adamw = flat_adamw(ours), torch_adamw(theirs)
    for step in range(8):
        rate, max_norm = 1e-2 / (1 + step), (0.5, 1e9)[step % 2]  # clipped, and not
        flat.zero_grad()
        flat.backward(loss_of(ours, step), 1)
        norm, _ = flat.step(rate, max_norm)
        adamw.zero_grad()
        loss_of(theirs, step).backward()
        assert norm == pytest.approx(
            float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)), rel=1e-5
        )
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter, theirs.get_parameter(name), rtol=1e-4, atol=1e-5), name


def test_norms_and_biases_never_decay() -> None:
    """With no gradient, an update is the decay alone."""
    model = random_model(attention_bias=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flat_adamw(model, weight_decay=0.5).step(0.1, max_norm=0.0)
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] * (0.95 if p.ndim > 1 else 1.0)), name


def test_16_bit_weights_have_fp32_masters_that_remember_small_updates() -> None:
    """bf16 has steps of 2^-8 near 1: an update of 0.001 is rounded away, ten of them are not."""
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    torch.nn.init.ones_(model.weight)
    flat, seen = flat_adamw(model, weight_decay=0.0), []
    for _ in range(10):
        flat.zero_grad()
        flat.backward(model(torch.ones(1, 1, dtype=torch.bfloat16)).sum(), 1)
        flat.step(0.001, max_norm=0.0)
        seen.append(model.weight.item())
    assert seen[0] == 1.0
    assert seen[-1] == 0.98828125  # 1 - 10 x 0.001, to the nearest bf16
    assert flat_weights(flat).item() == pytest.approx(0.99, abs=1e-6)


def test_16_bit_training_follows_a_float32_copy_of_its_masters() -> None:
    """Gradients are taken at the rounded weights, and updates are made in fp32."""
    ours = random_model().bfloat16()
    flat = flat_adamw(ours)
    masters = [p.detach().float().clone().requires_grad_() for _, p in flat.vectors[0].named]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in masters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in masters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    for step in range(5):
        flat.zero_grad()
        flat.backward(loss_of(ours, step), 1)
        for master, grad in zip(masters, flat.vectors[0].views(flat_gradient(flat)), strict=True):
            master.grad = grad.clone()
        flat.step(1e-2, max_norm=0.0)
        adamw.step()
    assert torch.allclose(
        flat_weights(flat), torch.cat([m.detach().flatten() for m in masters]), rtol=1e-5, atol=1e-6
    )
    views = flat.vectors[0].views(flat_weights(flat))
    assert all(
        torch.equal(p, m.to(torch.bfloat16))
        for (_, p), m in zip(flat.vectors[0].named, views, strict=True)
    )


def test_16_bit_gradients_add_up_in_fp32() -> None:
    """bf16 cannot hold 1 + 2^-9; the sum over micro-batches can."""
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    flat = flat_adamw(model)
    for x in (1.0, 2.0**-9):
        flat.backward(model(torch.tensor([[x]], dtype=torch.bfloat16)).sum(), 1)
    assert flat_gradient(flat).item() == 1.0 + 2.0**-9


def test_frozen_parameters_are_no_part_of_the_flat_vector() -> None:
    model = random_model()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert flat_adamw(model).num_trained == model.lm_head.weight.numel()


def test_the_exact_reduction_updates_by_the_formula_to_the_bit() -> None:
    """A fused kernel rounds the ends of a range differently, so its bits follow from the cut."""
    model = random_model()
    config = TrainConfig(reduction="exact", weight_decay=0.1)
    flat = ShardedOptimizer(model.named_parameters(), make_grid(MESH), config)
    flat.backward(loss_of(model, 0), 1)
    vector = flat.vectors[0]
    weight = vector.master.clone()
    grad = vector.gradients.reduced().clone()
    zeros = torch.zeros_like(weight)
    ranges = [
        (0, vector.layout.decayed, 0.1),
        (vector.layout.decayed, vector.layout.total, 0.0),
    ]
    for start, stop, weight_decay in ranges:
        reference.adamw(
            weight[start:stop],
            grad[start:stop],
            zeros[start:stop].clone(),
            zeros[start:stop].clone(),
            1,
            learning_rate=1e-2,
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            epsilon=config.adam_epsilon,
            weight_decay=weight_decay,
        )
    flat.step(1e-2, max_norm=0.0)
    assert torch.equal(vector.master, weight)


def test_the_exact_norm_has_a_number_for_each_parameter_whatever_lies_beside_it() -> None:
    """A matrix of one and a half chunks gives the same number alone and behind another."""
    matrix = torch.randn(CHUNK // 8, 12, generator=torch.Generator().manual_seed(0))
    numbers = []
    for others in (0, 1):
        named = [(f"other {i}", torch.nn.Parameter(torch.ones(5, 3))) for i in range(others)]
        named.append(("matrix", torch.nn.Parameter(torch.zeros_like(matrix))))
        config = TrainConfig(reduction="exact")
        optimizer = ShardedOptimizer(named, make_grid(MESH), config)
        loss = (named[-1][1] * matrix).sum() + sum(p.sum() for _, p in named[:-1])
        optimizer.backward(loss, 1)
        numbers.append(optimizer.vectors[0].squared_norms())
    first, second = matrix.view(-1)[:CHUNK], matrix.view(-1)[CHUNK:]
    alone = float(first.square().sum()) + float(second.square().sum())
    assert numbers == [[alone], [15.0, alone]]
