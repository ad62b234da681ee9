"""Tensor parallelism changes no loss, no gradient and no logit but by rounding."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from minillama import comm, ops
from minillama.comm import Mesh
from minillama.lora import LINEARS
from minillama.lora_layers import LoraEmbedding
from minillama.model import Llama
from minillama.ops import IGNORE, fused_loss
from minillama.parallel.tensor import CopyToRanks, SumOverRanks, parallelise
from minillama.parallel.vocabulary import Vocabulary, linear_cross_entropy
from minillama.peft_config import LoraConfig
from minillama.training.model_building import recompute_activations
from tests.adapters import with_random_adapter
from tests.conftest import random_model, random_tokens
from tests.ranks import run_on_ranks
from tests.tensor_ranks import (
    EIGHT_HEADS,
    assert_close,
    assert_same,
    compute,
    compute_on_ranks,
    compute_on_this_rank,
)

EVERY_LINEAR = (*LINEARS, "lm_head")


def with_lora(
    targets: tuple[str, ...] = EVERY_LINEAR,
    dropout: float = 0.0,
    modules_to_save: tuple[str, ...] = (),
    **changes,
) -> Llama:
    """A model with factors of which none is 0."""
    model = random_model(**EIGHT_HEADS, **changes)
    config = LoraConfig(
        rank=2, alpha=2.0, dropout=dropout, targets=targets, modules_to_save=modules_to_save
    )
    return with_random_adapter(model, config)


def with_embedding_lora() -> Llama:
    model = random_model(**EIGHT_HEADS).requires_grad_(False)
    embedding = LoraEmbedding(model.model.embed_tokens, 2, 0.5)
    generator = torch.Generator().manual_seed(1)
    for factor in embedding.factors().values():
        nn.init.normal_(factor, 0.0, 0.3, generator=generator)
    model.model.embed_tokens = embedding
    return model


def recomputing(build: Callable[[], Llama]) -> Llama:
    model = build()
    recompute_activations(model.model.layers)
    return model


def in_dtype(build: Callable[[], Llama], dtype: torch.dtype) -> Llama:
    return build().to(dtype)


plain = partial(random_model, **EIGHT_HEADS)
with_biases = partial(plain, attention_bias=True, mlp_bias=True)
MODELS = {
    "plain": plain,
    "tied": partial(plain, tie_embeddings=True),
    "biases": with_biases,
    "LoRA": with_lora,
    "LoRA and biases": partial(with_lora, attention_bias=True, mlp_bias=True),
    "LoRA with dropout": partial(with_lora, dropout=0.3),
    "LoRA and whole modules": partial(
        with_lora, LINEARS, modules_to_save=("embed_tokens", "lm_head")
    ),
    "LoRA on the head of a tied model": partial(with_lora, tie_embeddings=True),
    "LoRA on the embedding": with_embedding_lora,
    "recomputation": partial(recomputing, partial(with_lora, dropout=0.3)),
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_ranks_compute_the_loss_the_gradients_and_the_logits_of_one(
    build: Callable[[], Llama], size: int
) -> None:
    """With grouped heads, packed documents, and a vocabulary that four ranks do not divide."""
    expected = compute(build)
    computed = compute_on_ranks(size, build)
    for found in computed:
        assert_same(found, expected, tolerance=3e-6)
        assert found.loss == computed[0].loss, "ranks differ"
        assert (found.logits == computed[0].logits).all(), "ranks differ"


def test_eight_ranks_have_a_head_each_and_seven_rows_of_the_vocabulary_or_one_more() -> None:
    build = partial(plain, n_kv_heads=8)
    expected = compute(build)
    for found in compute_on_ranks(8, build):
        assert_same(found, expected, tolerance=3e-6)
        assert found.logits.shape == (2, 7, 50)


def test_three_ranks_have_a_key_value_head_each() -> None:
    """The last one has 18 rows of the vocabulary, the others 16."""
    expected = compute(random_model)
    for found in compute_on_ranks(3, random_model):
        assert_same(found, expected, tolerance=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ranks_compute_in_16_bits_what_one_does_up_to_its_rounding(dtype: torch.dtype) -> None:
    build = partial(in_dtype, plain, dtype)
    expected = compute(build)
    for found in compute_on_ranks(2, build):
        assert found.loss == pytest.approx(expected.loss, rel=3e-3)
        for name, gradient in expected.gradients.items():
            assert_close(found.gradients[name], gradient, 0.05, name)


def test_recomputation_gives_the_same_bits() -> None:
    build = partial(with_lora, dropout=0.3)
    stored = compute_on_ranks(2, build)[0]
    recomputed = compute_on_ranks(2, partial(recomputing, build))[0]
    assert recomputed.loss == stored.loss
    for name, gradient in stored.gradients.items():
        assert (recomputed.gradients[name] == gradient).all(), name


def test_one_rank_changes_nothing() -> None:
    model = plain()
    before = {name: module.forward for name, module in model.named_modules()}
    parallelise(model, Mesh())
    assert {name: module.forward for name, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def f_and_g() -> dict[str, list[float]]:
    """The outputs of f and g, and the gradients that they give back, on this rank."""
    with comm.start("cpu", timeout_minutes=1) as mesh:
        number = mesh.rank + 1
        x = torch.tensor([1.0, 10.0], requires_grad=True)
        gradient = torch.tensor([1.0, 2.0]) * number
        copied = CopyToRanks.apply(x, mesh)
        summed = SumOverRanks.apply(x * number, mesh)
        results = {
            "f": copied.tolist(),
            "df": torch.autograd.grad(copied, x, gradient)[0].tolist(),
            "g": summed.tolist(),
            "dg": torch.autograd.grad(summed, x, torch.ones(2))[0].tolist(),
        }
        assert gradient.tolist() == [number, 2.0 * number], "the caller's gradient was overwritten"
        return results


def test_f_sums_gradients_and_g_sums_outputs() -> None:
    """Rank 0 multiplies by 1, rank 1 by 2: f's gradients, and g's inputs."""
    f = [1.0, 10.0]
    df = [3.0, 6.0]
    g = [3.0, 30.0]
    assert run_on_ranks(2, f_and_g) == [
        {"f": f, "df": df, "g": g, "dg": [1.0, 1.0]},
        {"f": f, "df": df, "g": g, "dg": [2.0, 2.0]},
    ]


def g_of_a_saved_tensor() -> float:
    with comm.start("cpu", timeout_minutes=1) as mesh:
        x = torch.tensor([2.0], requires_grad=True)
        y = x.exp()  # autograd saves y, which is its own derivative
        SumOverRanks.apply(y, mesh).sum().backward()
        return x.grad.item()


def test_g_does_not_overwrite_what_autograd_has_saved() -> None:
    assert run_on_ranks(2, g_of_a_saved_tensor) == [pytest.approx(torch.tensor(2.0).exp())] * 2


def loss_of_rows(num_rows: tuple[int, ...], chunk: int) -> tuple[float, np.ndarray, np.ndarray]:
    """The loss of a head that is cut into these rows; its dh, summed over ranks, and dW, joined."""
    fused_loss.LOGIT_CHUNK = chunk
    with comm.start("cpu", timeout_minutes=1) as mesh:
        hidden, weight, labels = loss_inputs()
        own = weight.split(num_rows)[mesh.rank].clone().requires_grad_()
        hidden.requires_grad_()
        loss = linear_cross_entropy(Vocabulary(mesh, num_rows), hidden, own, labels)
        (3 * loss).backward()
        dh = comm.all_reduce_sum(mesh, hidden.grad)
        dw = torch.cat(comm.gather_objects(mesh, own.grad))
        return loss.item(), dh.numpy(), dw.numpy()


def loss_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 8, generator=generator)
    weight = torch.randn(10, 8, generator=generator)
    labels = random_tokens(2, 9, vocab_size=10)
    labels[0, 2:5] = IGNORE
    return hidden, weight, labels


@pytest.mark.parametrize("chunk", [1, 16, 1 << 20], ids=["one position", "a few", "all at once"])
@pytest.mark.parametrize("num_rows", [(5, 5), (3, 3, 4), (1, 8, 1)])
def test_the_loss_of_a_cut_head_is_that_of_the_whole(num_rows: tuple[int, ...], chunk: int) -> None:
    hidden, weight, labels = loss_inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    expected = ops.reference.linear_cross_entropy(hidden, weight, labels)
    (3 * expected).backward()
    for loss, dh, dw in run_on_ranks(len(num_rows), loss_of_rows, num_rows, chunk):
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        assert_close(dh, hidden.grad, 1e-6, "dh")
        assert_close(dw, weight.grad, 1e-6, "dW")


def loss_without_targets() -> float:
    with comm.start("cpu", timeout_minutes=1) as mesh:
        hidden = torch.ones(4, 8)
        labels = torch.full((4,), IGNORE)
        vocabulary = Vocabulary(mesh, (5, 5))
        return linear_cross_entropy(vocabulary, hidden, torch.ones(5, 8), labels).item()


def test_the_loss_without_any_target_is_zero() -> None:
    assert run_on_ranks(2, loss_without_targets) == [0.0, 0.0]


def compute_with_reference_loss(build: Callable[[], Llama]) -> object:
    ops.choose("linear_cross_entropy=reference")
    return compute_on_this_rank(build)


def test_the_reference_loss_of_ranks_reads_the_logits_of_the_whole_vocabulary() -> None:
    expected = compute(plain)
    for found in run_on_ranks(2, compute_with_reference_loss, plain):
        assert_same(found, expected, tolerance=3e-6)
