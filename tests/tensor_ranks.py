"""What tensor-parallel ranks compute, joined, beside what one rank computes."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from minillama import comm
from minillama.comm import Mesh
from minillama.device import seeded
from minillama.model import Llama
from minillama.ops import IGNORE, Documents
from minillama.parallel.shards import axis_of, join
from minillama.parallel.tensor import parallelise
from tests.conftest import random_tokens
from tests.ranks import run_on_ranks

# Eight heads and four key/value heads, so that two and four ranks have whole groups; the vocabulary
# of 50 is a multiple of neither three nor four nor eight.
EIGHT_HEADS = {"n_heads": 8, "n_kv_heads": 4, "dim": 24, "head_dim": 4, "ffn_dim": 48}
LENGTHS = [5, 2, 9, 4]  # of documents
SEED = 3  # of dropout


def sample_batch() -> tuple[Tensor, Tensor]:
    """Tokens and labels (1, 20); some positions have no label."""
    tokens = random_tokens(1, sum(LENGTHS))
    labels = random_tokens(1, sum(LENGTHS), seed=1)
    labels[0, ::3] = IGNORE
    return tokens, labels


def loss_and_gradients(model: Llama) -> tuple[float, dict[str, Tensor]]:
    """The loss of the sample batch, and the gradient of each trained parameter by name."""
    tokens, labels = sample_batch()
    with seeded(SEED, torch.device("cpu")):
        loss = model.loss_sum(tokens, labels, Documents(LENGTHS)) / 10
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            gradients[name] = parameter.grad
    return loss.item(), gradients


def is_partial(name: str) -> bool:
    """Whether the gradient on a rank is a part of a sum: so for LoRA's uncut factors."""
    return "lora_" in name and axis_of(name) is None


def join_gradients(mesh: Mesh, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of whole parameters. Those of uncut ones must be the same on all ranks."""
    joined = {}
    for name, gradient in gradients.items():
        parts = comm.gather_objects(mesh, gradient)
        if is_partial(name):
            joined[name] = sum(parts)
            continue
        joined[name] = join(parts, axis_of(name))
        if axis_of(name) is None:
            for part in parts:
                assert torch.equal(part, parts[0]), name
    return joined


class Computed(NamedTuple):
    """What a model computes of the sample batch, and its logits (2, 7, V) without dropout.

    Tensors are numpy arrays, which can be sent from a process that ends.
    """

    loss: float
    gradients: dict[str, np.ndarray]  # of whole parameters
    logits: np.ndarray


def compute(build: Callable[[], Llama], mesh: Mesh | None = None) -> Computed:
    """Run the model that `build` makes, cut over the ranks of `mesh`; None: over no others."""
    if mesh is None:
        mesh = Mesh()
    model = build().train()
    parallelise(model, mesh)
    loss, gradients = loss_and_gradients(model)
    joined = join_gradients(mesh, gradients)
    arrays = {name: gradient.float().numpy() for name, gradient in joined.items()}
    return Computed(loss, arrays, logits_of(model).float().numpy())


def compute_on_ranks(size: int, build: Callable[[], Llama]) -> list[Computed]:
    """`compute` on each of `size` ranks."""
    return run_on_ranks(size, compute_on_this_rank, build)


def compute_on_this_rank(build: Callable[[], Llama]) -> Computed:
    with comm.start("cpu", timeout_minutes=1) as mesh:
        return compute(build, mesh)


def logits_of(model: Llama) -> Tensor:
    model.eval()
    with torch.inference_mode():
        return model.logits(model(random_tokens(2, 7))).clone()


def assert_close(found: ArrayLike, expected: ArrayLike, tolerance: float, what: str) -> None:
    """Compare with the largest expected number, so that sums near zero may be rounded."""
    found = np.asarray(found)
    expected = np.asarray(expected)
    largest = np.abs(expected).max()
    difference = np.abs(found - expected).max()
    assert difference <= tolerance * largest, f"{what}: {difference:g} of {largest:g}"


def assert_same(found: Computed, expected: Computed, tolerance: float) -> None:
    assert abs(found.loss - expected.loss) <= tolerance * expected.loss
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert_close(found.gradients[name], gradient, tolerance, name)
    assert_close(found.logits, expected.logits, tolerance, "logits")
