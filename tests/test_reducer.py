"""The reducer: every gradient reaches its place once, and its memory is bounded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minillama import comm
from minillama.comm import Mesh
from minillama.grid import make_grid
from minillama.parallel.flat_layout import lay_out
from minillama.parallel.pairwise_sum import PairwiseSum
from minillama.parallel.reducer import GradientReducer
from minillama.parallel.sharded_optimizer import ShardedOptimizer
from minillama.train_config import TrainConfig
from tests.conftest import random_model, random_tokens
from tests.test_zero import settings_of


def test_stage_2_sends_and_frees_its_buckets_while_backward_goes_on():
    """Never more under way than two buckets and the vectors, of which the first layer's come
    last.
    """
    net = random_model(n_layers=6)
    gradients = (
        ShardedOptimizer(
            net.named_parameters(), make_grid(Mesh()), settings_of(2, bucket_elements=3000)
        )
        .vectors[0]
        .gradients
    )
    under_way = []
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: under_way.append(sum(t.numel() for t in gradients.filled.values()))
        )
    tokens = random_tokens(1, 9)
    net.loss_sum(tokens, tokens).backward()
    sizes, vectors = (
        [p.numel() for p in net.parameters()],
        sum(p.numel() for p in net.parameters() if p.ndim == 1),
    )
    assert len(under_way) == len(sizes)
    assert 0 < max(under_way) <= 2 * max(3000, *sizes) + vectors < sum(sizes) / 2


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 90), max_size=6),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.sampled_from([0, 1, 2]),
    st.integers(1, 5),
    st.integers(1, 100),
    st.booleans(),
    st.sampled_from([1, 7]),
)
def test_every_gradient_reaches_its_place_in_its_owners_slice_once(
    matrices, vectors, stage, size, bucket, accumulates, align
):
    """The gradient of each number is its position, so the sum over rounds is the positions
    themselves, slice after slice, and 0 in the gaps.
    """
    parameters = [nn.Parameter(torch.zeros(n, 1)) for n in matrices] + [
        nn.Parameter(torch.zeros(n)) for n in vectors
    ]
    layout = lay_out([p.shape for p in parameters], align)
    slice_size, rounds, slices = -(-layout.total // size) + 1, 1 + accumulates, []
    positions = []
    expected = torch.zeros(size * slice_size)
    for place, parameter in zip(layout.ranges, parameters, strict=True):
        position = torch.arange(float(place.start), float(place.stop))
        positions.append(position.view(parameter.shape))
        expected[place.start : place.stop] = rounds * position
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "reduce_to", lambda mesh, tensor, **_: lambda: tensor)
        for rank in range(size if stage else 1):
            gradients = GradientReducer(
                parameters,
                layout,
                Mesh(rank, size),
                slice_size,
                settings_of(stage, bucket_elements=bucket),
            )
            for _ in range(rounds):
                sum((p * x).sum() for p, x in zip(parameters, positions, strict=True)).backward()
                gradients.end_micro_batch()
            slices.append(gradients.reduced())
            parameters = [nn.Parameter(p.detach()) for p in parameters]  # without hooks
    assert torch.equal(torch.cat(slices), expected)


@given(st.integers(1, 40), st.sampled_from([1, 2, 4, 8]))
def test_the_tree_of_sums_does_not_depend_on_the_ranks(count, ranks):
    """Strings as numbers whose sum shows the order: ranks first, then a binary counter, is the
    tree that one rank builds alone.
    """

    class Sum:
        def __init__(self, text):
            self.text = text

        def add_(self, other):
            return Sum(f"({self.text}+{other.text})")

    def tree(leaves: list[Sum]) -> str:
        counter = PairwiseSum()
        for leaf in leaves:
            counter.add(leaf)
        return counter.result().text

    leaves = [Sum(str(i)) for i in range(count)]
    groups = [comm.pairwise_sum(list(leaves[i : i + ranks])) for i in range(0, count, ranks)]
    assert tree(groups) == tree(leaves)


@pytest.mark.parametrize(
    ("stage", "reduction", "accumulation", "reduced_in", "sum_in"),
    [
        (0, "fast", 1, torch.bfloat16, torch.bfloat16),
        (1, "fast", 4, torch.float32, torch.float32),
        (2, "fast", 1, torch.bfloat16, torch.bfloat16),
        (2, "fast", 4, torch.bfloat16, torch.float32),
        (0, "exact", 1, torch.float32, torch.float32),
        (2, "exact", 4, torch.float32, torch.float32),
    ],
)
def test_gradients_of_a_16_bit_model_are_reduced_as_the_table_says(
    stage, reduction, accumulation, reduced_in, sum_in
):
    """The table at the head of the module. Sums over micro-batches are fp32."""
    config = TrainConfig(
        zero_stage=stage, reduction=reduction, gradient_accumulation_steps=accumulation
    )
    parameters = [nn.Parameter(torch.zeros(8, 2, dtype=torch.bfloat16))]
    layout = lay_out([parameters[0].shape])
    reducer = GradientReducer(parameters, layout, Mesh(), slice_size=16, config=config)
    assert reducer.reduce_dtype == reduced_in
    parameters[0].sum().backward()
    reducer.end_micro_batch()
    assert reducer.reduced().dtype == sum_in


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("exact", [False, True])
def test_a_parameter_that_no_loss_depends_on_has_a_gradient_of_zero(stage, exact):
    used, unused = nn.Parameter(torch.ones(3, 1)), nn.Parameter(torch.ones(2, 1))
    layout = lay_out([unused.shape, used.shape])
    for rounds in (1, 2):
        config = settings_of(stage, exact=exact, gradient_accumulation_steps=rounds)
        reducer = GradientReducer([unused, used], layout, Mesh(), slice_size=6, config=config)
        for _ in range(rounds):
            used.sum().backward()
            reducer.end_micro_batch()
        assert reducer.reduced().tolist() == [0, 0, rounds, rounds, rounds, 0]
        used, unused = nn.Parameter(torch.ones(3, 1)), nn.Parameter(torch.ones(2, 1))


def test_a_micro_batch_after_the_sum_was_asked_for_is_refused():
    """Gradients that were summed over the ranks already must not be summed again."""
    parameter = nn.Parameter(torch.ones(3, 1))
    layout = lay_out([parameter.shape])
    reducer = GradientReducer([parameter], layout, Mesh(), slice_size=3, config=settings_of(0))
    for _ in range(2):
        reducer.clear()
        parameter.sum().backward()
        reducer.end_micro_batch()
        assert reducer.reduced().tolist() == [1, 1, 1]
    parameter.sum().backward()
    with pytest.raises(AssertionError, match="clear"):
        reducer.end_micro_batch()


@pytest.mark.parametrize("stage, size, is_kept", [(0, 2, True), (1, 2, True), (2, 2, False)])
def test_ranks_of_a_cpu_keep_the_vector_and_nothing_of_its_gradients(
    stage, size, is_kept, monkeypatch
):
    """A parameter without a gradient in the second step does not get that of the first."""
    monkeypatch.setattr(comm, "reduce_to", lambda mesh, tensor, **_: lambda: tensor)
    one, other = nn.Parameter(torch.ones(3, 1)), nn.Parameter(torch.ones(3, 1))
    layout = lay_out([one.shape, other.shape])
    reducer = GradientReducer(
        [one, other], layout, Mesh(0, size), slice_size=4, config=settings_of(stage)
    )
    (one.sum() + other.sum()).backward()
    reducer.end_micro_batch()
    assert reducer.reduced()[:4].tolist() == [1, 1, 1, 1]
    before = reducer.vector
    reducer.clear()
    assert reducer.vector is before and (before is not None) == is_kept
    (2 * other.sum()).backward()
    reducer.end_micro_batch()
    assert reducer.reduced()[:4].tolist() == [0, 0, 0, 2]


def test_one_rank_gives_the_memory_of_its_gradients_back():
    parameter = nn.Parameter(torch.ones(3, 1))
    layout = lay_out([parameter.shape])
    reducer = GradientReducer([parameter], layout, Mesh(), slice_size=3, config=settings_of(0))
    parameter.sum().backward()
    assert reducer.vector is not None
    reducer.clear()
    assert reducer.vector is None
