"""Packed rows: documents end to end are trained exactly as if each stood alone."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama.llama_config import RopeScaling
from minillama.ops import IGNORE, Documents
from minillama.ops.packing import Group
from tests.conftest import random_model, random_tokens

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=12)


def test_positions_restart_in_each_document() -> None:
    assert Documents([5, 2, 4]).positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3]


def test_two_documents_are_the_rows_of_one_group() -> None:
    """The picture of `ops.packing`: a a a and b b, where slot 5 is padding."""
    documents = Documents([3, 2])
    layout = documents.layout
    assert documents.groups == [Group(documents=[0, 1], length=3)]
    assert layout.gather_index.tolist() == [0, 1, 2, 3, 4, 4]
    assert layout.inverse_index.tolist() == [0, 1, 2, 3, 4]
    assert layout.padding.tolist() == [5]


def test_the_longest_document_comes_first_in_its_group() -> None:
    documents = Documents([5, 2, 4])
    layout = documents.layout
    assert documents.groups == [Group(documents=[0, 2, 1], length=5)]
    assert layout.gather_index.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 10, 5, 6, 6, 6, 6]
    assert layout.inverse_index.tolist() == [0, 1, 2, 3, 4, 10, 11, 5, 6, 7, 8]
    assert layout.padding.tolist() == [9, 12, 13, 14]


@given(LENGTHS)
@settings(max_examples=150, deadline=None)
def test_every_token_has_one_slot_and_every_other_slot_is_padding(lengths: list[int]) -> None:
    documents = Documents(lengths)
    layout = documents.layout
    num_slots = len(layout.gather_index)
    assert layout.gather_index[layout.inverse_index].tolist() == list(range(sum(lengths)))
    assert sorted([*layout.inverse_index.tolist(), *layout.padding.tolist()]) == list(
        range(num_slots)
    )
    assert num_slots == sum(group.num_slots for group in documents.groups)
    grouped = [document for group in documents.groups for document in group.documents]
    assert sorted(grouped) == list(range(len(lengths)))


@given(LENGTHS)
@settings(max_examples=150, deadline=None)
def test_padding_is_bounded_by_an_eighth_and_sixteen(lengths: list[int]) -> None:
    for group in Documents(lengths).groups:
        bound = 16 + group.length // 8
        assert all(group.length - lengths[document] <= bound for document in group.documents)


def test_the_loss_of_packed_documents_is_the_sum_of_their_losses() -> None:
    """One row of four documents against four rows of one: loss and every gradient."""
    model, lengths = random_model(), [9, 1, 30, 4]
    tokens, labels = random_tokens(1, 44), random_tokens(1, 44, seed=1)
    labels[0, ::3] = IGNORE
    packed = model.loss_sum(tokens, labels, Documents(lengths))
    packed.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = sum(
        model.loss_sum(t, l)
        for t, l in zip(tokens.split(lengths, 1), labels.split(lengths, 1), strict=True)
    )
    alone.backward()
    assert torch.allclose(packed, alone, rtol=1e-6)
    for name, p in model.named_parameters():
        assert (gradients[name] - p.grad).abs().max() <= 1e-5 * p.grad.abs().max(), name


def test_no_document_sees_another() -> None:
    """Changing the middle document leaves the others' hidden states as they are, to the bit."""
    model, documents, tokens = random_model(), Documents([6, 8, 5]), random_tokens(1, 19)
    changed = tokens.clone()
    changed[0, 6:14] = (changed[0, 6:14] + 1) % 50
    before, after = model(tokens, documents), model(changed, documents)
    others = [*range(6), *range(14, 19)]
    assert torch.equal(before[0, others], after[0, others])
    assert not torch.equal(before[0, 6:14], after[0, 6:14])


def test_no_gradient_crosses_between_documents() -> None:
    """The loss of the last document moves no embedding that only the first one uses."""
    model = random_model()
    tokens = torch.tensor([[1, 2, 3, 4, 11, 12, 13]])
    labels = torch.tensor([[IGNORE] * 4 + [12, 13, 14]])
    model.loss_sum(tokens, labels, Documents([4, 3])).backward()
    moved = model.model.embed_tokens.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert moved == [11, 12, 13]


def test_where_a_document_stands_in_the_row_does_not_matter() -> None:
    model, a, b = random_model(), random_tokens(1, 7), random_tokens(1, 20, seed=1)
    first = model(torch.cat((a, b), 1), Documents([7, 20]))
    last = model(torch.cat((b, a), 1), Documents([20, 7]))
    assert torch.allclose(first[0, :7], last[0, 20:], atol=1e-5)
    assert torch.allclose(first[0, :7], model(a)[0], atol=1e-5)


@torch.no_grad()
def test_packed_documents_have_the_frequencies_of_the_longest() -> None:
    """Dynamic scaling depends on the length; in a row, on that of the longest document."""
    model = random_model(rope_scaling=RopeScaling("dynamic", 2.0), max_seq_len=16)
    lengths = [30, 12, 30]
    tokens = random_tokens(1, sum(lengths))
    packed = model(tokens, Documents(lengths))[0].split(lengths)
    documents = tokens[0].split(lengths)
    for number in (0, 2):
        alone = model(documents[number].unsqueeze(0))[0]
        assert torch.allclose(packed[number], alone, atol=1e-5)
