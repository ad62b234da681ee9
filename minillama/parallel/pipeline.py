"""Pipeline parallelism: each rank of a line holds some consecutive layers of one model.

    stage 0    tokens ─▶ embedding ─▶ layers 0 … 3 ─┐  activations (T, C)
    stage 1      ┌──────────────────────────────────┘
                 └▶ layers 4 … 7 ─▶ norm ─▶ head ─▶ loss

Activations go to the next stage, their gradients come back. Stages work at the same time because
each works on another micro-batch. The schedule is 1F1B, one forward, one backward (Narayanan et
al. 2021, section 2.2). F2 is the forward of micro-batch 2, B2 its backward:

    time       1   2   3   4   5   6   7   8   9  10
    stage 0   F0  F1   .  B0  F2  B1  F3  B2   .  B3
    stage 1    .  F0  B0  F1  B1  F2  B2  F3  B3   .
              └ fill ┘    one forward, one backward     drain

Stage s of S keeps the activations of at most S - s micro-batches. The time without work, S - 1
forwards and backwards of a step, does not grow with the number of micro-batches. On every stage
backwards run in the order of the micro-batches, so gradients are added in the order of one rank:
with `reduction = "exact"` the result is that of one rank to the bit.

A stage is a `Llama` whose other parts are replaced by modules that hold nothing. The parameters of
layer 5 are called model.layers.5 on every stage. Tied weights are on both ends: the last stage has
a copy of the embedding, under the embedding's name, and the two gradients have to be summed.

Dropout draws from one generator through all layers. Its state travels with the activations, so
the masks do not depend on the number of stages.

Left out: interleaved stages, which shorten the time without work and send more.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minillama import comm
from minillama.comm import Mesh
from minillama.device import random_state, set_random_state
from minillama.parallel.shards import layers_of_stage
from minillama.point_to_point import exchange

# number of a micro-batch -> what this stage computes of it: activations, or on the last stage the
# loss
Forward = Callable[[int], Tensor]
# (number of a micro-batch, loss): runs backward from the loss, which is a `GradientOfNextStage` on
# other stages than the last
Backward = Callable[[int, Tensor], None]


class StageInput(nn.Module):
    """In place of the embedding: returns the activations of the stage before.

    weight: the embedding, (V, C), on the last stage of a tied model.
    """

    def __init__(self, weight: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.activations: Tensor | None = None
        self.random_state: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        activations = self.activations
        assert activations is not None, "each is received before its forward"
        self.activations = None
        if self.random_state is not None:
            set_random_state(self.random_state, tokens.device)
        return activations


class ForeignLayer(nn.Module):
    """In place of a layer of another stage: returns what it is given."""

    def forward(self, x: Tensor, *others: object) -> Tensor:
        return x


class StageOutput(nn.Module):
    """In place of the head: returns the hidden states, which are for the next stage."""

    def __init__(self) -> None:
        super().__init__()
        self.random_state: Tensor | None = None

    def loss_sum(self, x: Tensor, labels: Tensor) -> Tensor:
        self.random_state = random_state(x.device)
        return x


class GradientOfNextStage(torch.autograd.Function):
    """A number that stands for the loss: its gradient by the activations is the one received.

    Whatever it is multiplied by, that gradient stays as it is: the last stage has scaled the loss.
    `Tensor.backward(gradient)` would do too, but it loads torch's compiler, which takes 30 MB.
    """

    @staticmethod
    def forward(ctx: Any, activations: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return activations.new_zeros(())

    @staticmethod
    def backward(ctx: Any, unused: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient, None


@dataclass
class MicroBatch:
    """A micro-batch between its forward and its backward on this stage."""

    received: Tensor | None  # activations of the stage before, (1, T, C); None on stage 0
    output: Tensor  # activations (1, T, C), or the loss

    def loss(self, gradient: Tensor | None) -> Tensor:
        """What backward starts from. gradient: of the activations; None: `output` is the loss."""
        if gradient is None:
            return self.output
        return GradientOfNextStage.apply(self.output, gradient)

    @property
    def gradient(self) -> Tensor | None:
        """After backward: the gradient of what was received, (1, T, C)."""
        return None if self.received is None else self.received.grad


@dataclass
class Stage:
    """One rank's part of a pipeline: what `keep_stage` left of a model, and its neighbours."""

    mesh: Mesh  # the line of stages
    width: int  # C
    dtype: torch.dtype  # of the activations
    sends_random_state: bool
    input: StageInput | None = None  # in place of the embedding; None on stage 0
    output: StageOutput | None = None  # in place of the head; None on the last stage

    @property
    def is_last(self) -> bool:
        return self.output is None

    def run_1f1b(self, lengths: Sequence[int], forward: Forward, backward: Backward) -> None:
        """Run forward and backward of every micro-batch, each in the order of their numbers.

        All stages must call this with the same lengths.

        Args:
            lengths: T of each micro-batch; there may be fewer of them than stages, or none.
        """
        count = len(lengths)
        stages_after = self.mesh.size - 1 - self.mesh.rank
        fill = min(stages_after, count)
        alive: deque[MicroBatch] = deque()

        # 1. fill: forwards until the last stage has its first micro-batch
        for number in range(fill):
            received = self.exchange_with_previous(None, lengths[number])
            output = forward(number)
            self.exchange_with_next(output, None)
            alive.append(MicroBatch(received, output))

        # 2. one forward of a new micro-batch, one backward of the oldest
        received = self.exchange_with_previous(None, lengths[fill]) if fill < count else None
        for number in range(fill, count):
            output = forward(number)
            alive.append(MicroBatch(received, output))
            oldest = alive.popleft()
            gradient = self.exchange_with_next(output, lengths[number - fill])
            backward(number - fill, oldest.loss(gradient))
            next_length = lengths[number + 1] if number + 1 < count else None
            received = self.exchange_with_previous(oldest.gradient, next_length)

        # 3. drain: backwards of what is left
        for number in range(count - fill, count):
            oldest = alive.popleft()
            gradient = self.exchange_with_next(None, lengths[number])
            backward(number, oldest.loss(gradient))
            self.exchange_with_previous(oldest.gradient, None)

    def run_forward(self, lengths: Sequence[int], forward: Forward) -> None:
        """Run the forward of every micro-batch, as evaluation does. Called without gradients."""
        for number, length in enumerate(lengths):
            self.exchange_with_previous(None, length)
            output = forward(number)
            self.exchange_with_next(output, None)

    def exchange_with_next(self, activations: Tensor | None, length: int | None) -> Tensor | None:
        """Send activations to the next stage, and receive gradients from it.

        Args:
            activations: (1, T, C); None: nothing is sent.
            length: T of the gradients; None: nothing is received.

        Returns the gradients (1, T, C), or None.
        """
        if self.output is None:
            return None
        sent = []
        if activations is not None:
            sent.append(activations.detach())
            if self.sends_random_state:
                assert self.output.random_state is not None
                sent.append(self.output.random_state.to(self.mesh.device))
        gradient = None if length is None else self._room(length)
        received = [] if gradient is None else [gradient]
        exchange(self.mesh, self.mesh.rank + 1, sent, received)
        return gradient

    def exchange_with_previous(self, gradient: Tensor | None, length: int | None) -> Tensor | None:
        """Send gradients to the stage before, and receive activations from it.

        Args:
            gradient: (1, T, C); None: nothing is sent.
            length: T of the activations; None: nothing is received.

        Returns the activations (1, T, C), or None. The next forward reads them from `self.input`.
        """
        if self.input is None:
            return None
        sent = [] if gradient is None else [gradient]
        if length is None:
            exchange(self.mesh, self.mesh.rank - 1, sent, [])
            return None
        activations = self._room(length)
        received = [activations]
        if self.sends_random_state:
            received.append(random_state(self.mesh.device).to(self.mesh.device))
        exchange(self.mesh, self.mesh.rank - 1, sent, received)
        activations.requires_grad_(torch.is_grad_enabled())
        self.input.activations = activations
        if self.sends_random_state:
            self.input.random_state = received[1].cpu()
        return activations

    def _room(self, length: int) -> Tensor:
        """Room for the activations of a micro-batch, or for their gradient: (1, T, C)."""
        return torch.empty(1, length, self.width, dtype=self.dtype, device=self.mesh.device)


def keep_stage(model: nn.Module, mesh: Mesh, has_dropout: bool = False) -> Stage:
    """Replace the parts of a `Llama` that belong to other stages. Names stay as they were.

    Args:
        model: on any device; what is replaced may be on the meta device.
        mesh: the line of stages. Every rank of it must call this.
        has_dropout: whether the model draws random numbers in training.

    Raises UserError if there are more stages than layers.
    """
    embedding = model.get_parameter("model.embed_tokens.weight")
    head = model.get_parameter("lm_head.weight")
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    own_layers = layers_of_stage(len(layers), mesh.size, mesh.rank)
    for index in range(len(layers)):
        if index not in own_layers:
            layers[index] = ForeignLayer()

    is_last = mesh.rank == mesh.size - 1
    stage = Stage(mesh, embedding.shape[1], embedding.dtype, has_dropout)
    if mesh.rank > 0:
        stage.input = StageInput(embedding if is_last and head is embedding else None)
        model.set_submodule("model.embed_tokens", stage.input)
    if not is_last:
        stage.output = StageOutput()
        model.set_submodule("model.norm", nn.Identity())
        model.set_submodule("lm_head", stage.output)
    comm.barrier(mesh)  # NCCL connects the ranks of a line in their first collective
    return stage
