"""Stages of a pipeline compute what one rank computes, to the bit."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from minillama import comm
from minillama.device import random_state, seeded
from minillama.errors import UserError
from minillama.lora import add_lora
from minillama.model import Llama
from minillama.ops import Documents
from minillama.parallel.pipeline import keep_stage
from minillama.peft_config import LINEARS, LoraConfig
from minillama.point_to_point import exchange
from minillama.training.model_building import recompute_activations
from tests.conftest import TINY, random_model, random_tokens
from tests.ranks import run_on_ranks

LAYERS = 5  # no multiple of 2, 3 or 4 stages
LENGTHS = [7, 12, 3, 9, 5]
EMBEDDING = "model.embed_tokens.weight"
CPU = torch.device("cpu")
WITH_DROPOUT = ("LoRA", "recomputed")


@dataclass
class Result:
    """What the last of a few steps came to, on one rank."""

    losses: list[float]  # of all micro-batches and steps; on the last stage only
    gradients: dict[str, np.ndarray]
    elements_sent: float = 0.0


def new_model(kind: str) -> Llama:
    """A random model: plain, tied, with LoRA and dropout, or that with recomputation."""
    model = random_model(n_layers=LAYERS, tie_embeddings=kind == "tied")
    if kind in WITH_DROPOUT:
        config = LoraConfig(rank=2, alpha=4.0, dropout=0.3, targets=(*LINEARS, "lm_head"))
        add_lora(model, config, torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(2)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, generator=generator)
    if kind == "recomputed":
        recompute_activations(model.model.layers)
    return model


def compute(model: Llama, number: int, length: int) -> Tensor:
    """What a model, or one stage of it, computes of a micro-batch of two documents."""
    tokens = random_tokens(1, length, seed=number)
    with seeded(number, CPU):
        return model.loss_sum(tokens, tokens.roll(-1, 1), Documents([length - 2, 2]))


def take_steps(model: Llama, steps: int) -> Iterator[int]:
    """Steps of torch's AdamW. The gradients of the last one stay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        yield step
        if step < steps - 1:
            optimizer.step()


def gradients_of(model: Llama) -> dict[str, np.ndarray]:
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.numpy()
    return gradients


def train_alone(kind: str, lengths: list[int], steps: int = 2) -> Result:
    model = new_model(kind)
    losses = []
    for _ in take_steps(model, steps):
        for number, length in enumerate(lengths):
            loss = compute(model, number, length)
            loss.backward()
            losses.append(loss.item())
    return Result(losses, gradients_of(model))


def train_a_stage(kind: str, lengths: list[int], steps: int = 2) -> Result:
    """As `train_alone`, on the stage of this rank."""
    with comm.start("cpu", timeout_minutes=1) as mesh:
        model = new_model(kind)
        stage = keep_stage(model, mesh, has_dropout=kind in WITH_DROPOUT)
        losses = []
        alive: list[int] = []  # micro-batches between forward and backward

        def forward(number: int) -> Tensor:
            output = compute(model, number, lengths[number])
            if stage.is_last:
                losses.append(output.item())
            alive.append(number)
            assert len(alive) <= mesh.size - mesh.rank
            return output

        def backward(number: int, loss: Tensor) -> None:
            assert number == alive.pop(0)
            loss.backward()

        for _ in take_steps(model, steps):
            stage.run_1f1b(lengths, forward, backward)
        return Result(losses, gradients_of(model), mesh.elements_sent)


def assert_same(results: list[Result], expected: Result) -> None:
    """Each name has a gradient on one stage, and its bytes are those of one rank."""
    assert results[-1].losses == expected.losses
    found: dict[str, np.ndarray] = {}
    for result in results:
        assert not found.keys() & result.gradients.keys()
        found |= result.gradients
    assert found.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert np.array_equal(found[name], gradient), name


@pytest.mark.parametrize("kind", ["plain", *WITH_DROPOUT])
@pytest.mark.parametrize("stages", [2, 4])
def test_stages_compute_the_losses_and_gradients_of_one_rank(kind: str, stages: int) -> None:
    results = run_on_ranks(stages, train_a_stage, kind, LENGTHS)
    assert_same(results, train_alone(kind, LENGTHS))


@pytest.mark.parametrize("count", range(4))
def test_there_may_be_fewer_micro_batches_than_stages(count: int) -> None:
    lengths = LENGTHS[:count]
    results = run_on_ranks(4, train_a_stage, "plain", lengths)
    assert_same(results, train_alone("plain", lengths))


@pytest.mark.parametrize("stages", [2, 3])
def test_the_ends_of_a_tied_model_have_one_part_each_of_its_gradient(stages: int) -> None:
    expected = train_alone("tied", LENGTHS, steps=1)
    results = run_on_ranks(stages, train_a_stage, "tied", LENGTHS, 1)
    parts = [result.gradients.pop(EMBEDDING) for result in results if EMBEDDING in result.gradients]
    assert len(parts) == 2
    whole = expected.gradients.pop(EMBEDDING)
    np.testing.assert_allclose(parts[0] + parts[1], whole, rtol=1e-5, atol=1e-6)
    assert_same(results, expected)


def test_a_stage_sends_activations_and_gradients_and_with_dropout_a_random_state() -> None:
    """Two stages exchange (T, C) for each micro-batch, in each direction."""
    steps = 2
    elements = steps * sum(LENGTHS) * TINY.dim
    first, last = run_on_ranks(2, train_a_stage, "plain", LENGTHS, steps)
    assert first.elements_sent == last.elements_sent == elements
    first, last = run_on_ranks(2, train_a_stage, "LoRA", LENGTHS, steps)
    states = steps * len(LENGTHS) * random_state(CPU).numel()
    assert (first.elements_sent, last.elements_sent) == (elements + states, elements)


def evaluate_a_stage() -> list[float]:
    with comm.start("cpu", timeout_minutes=1) as mesh, torch.no_grad():
        model = new_model("tied").eval()
        stage = keep_stage(model, mesh)
        losses = []

        def forward(number: int) -> Tensor:
            output = compute(model, number, LENGTHS[number])
            losses.append(output)
            return output

        stage.run_forward(LENGTHS, forward)
        return [float(loss) for loss in losses] if stage.is_last else []


def test_evaluation_runs_forwards_alone() -> None:
    model = new_model("tied").eval()
    with torch.no_grad():
        expected = [float(compute(model, *item)) for item in enumerate(LENGTHS)]
    assert run_on_ranks(3, evaluate_a_stage) == [[], [], expected]


def names_of_a_stage(kind: str) -> list[str]:
    with comm.start("cpu", timeout_minutes=1) as mesh:
        model = new_model(kind)
        keep_stage(model, mesh)
        return [name for name, _ in model.named_parameters()]


def test_parameters_keep_their_names_and_lie_on_one_stage() -> None:
    stages = run_on_ranks(3, names_of_a_stage, "plain")
    together = [name for names in stages for name in names]
    assert together == [name for name, _ in new_model("plain").named_parameters()]
    tied = run_on_ranks(3, names_of_a_stage, "tied")
    assert tied[0][0] == tied[2][0] == EMBEDDING
    assert EMBEDDING not in tied[1]
    assert "lm_head.weight" not in tied[2]


def refusal_of_stages() -> str:
    with comm.start("cpu", timeout_minutes=1) as mesh:
        model = random_model(n_layers=2)
        with pytest.raises(UserError) as error:
            keep_stage(model, mesh)
        return str(error.value)


def test_more_stages_than_layers_are_refused() -> None:
    for message in run_on_ranks(3, refusal_of_stages):
        assert message == "n_layers = 2 cannot fill 3 pipeline stages; use at most 2"


def exchange_at_once(size: int) -> float:
    """Both ranks send before the other has received anything."""
    with comm.start("cpu", timeout_minutes=1) as mesh:
        own = torch.full((size,), float(mesh.rank))
        other = torch.empty(size)
        exchange(mesh, 1 - mesh.rank, [own], [other])
        return other.mean().item()


def test_two_ranks_send_to_each_other_at_the_same_time() -> None:
    assert run_on_ranks(2, exchange_at_once, 1 << 22) == [1.0, 0.0]


def wait_for_a_rank_that_ended() -> str:
    with comm.start("cpu", timeout_minutes=1) as mesh:
        if mesh.rank == 1:
            return ""
        with pytest.raises(UserError) as error:
            exchange(mesh, 1, [], [torch.empty(4)])
        return str(error.value)


def test_a_peer_that_has_ended_is_named() -> None:
    message, _ = run_on_ranks(2, wait_for_a_rank_that_ended)
    assert "rank 0 of 2: the exchange with rank 1 failed" in message
