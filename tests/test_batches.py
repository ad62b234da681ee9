"""Batches: every step is a function of its number, on any number of ranks."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from minillama.data.batches import BatchPlan, pack_rows
from minillama.data.memmap import Dataset
from minillama.data.show import show_batch
from minillama.data.windows import TrainingWindows, count_targets, cut_text, join_ranges
from minillama.errors import UserError
from tests.datasets import all_ids, document, write_dataset


def plan_of(prefix, rows_per_step=4, rows_per_micro_batch=2, seed=3, epochs=2.0):
    return BatchPlan(
        TrainingWindows(Dataset(prefix), max_length=256),
        rows_per_step=rows_per_step,
        rows_per_micro_batch=rows_per_micro_batch,
        seed=seed,
        epochs=epochs,
    )


def documents_of(batches):
    """The documents of batches, each as a list of ids."""
    documents = []
    for batch in batches:
        bounds = np.cumsum([0, *batch.lengths])
        for start, end in pairwise(bounds):
            documents.append(batch.tokens[start:end].tolist())
    return documents


def test_the_ranges_of_windows_are_joined() -> None:
    """The worked example of `join_ranges`."""
    positions = join_ranges(np.array([4, 10]), np.array([4, 3]))
    assert positions.tolist() == [4, 5, 6, 7, 10, 11, 12]


def test_text_is_cut_into_windows_that_predict_every_token_but_the_first() -> None:
    """The worked example of `cut_text`: documents of 10 and 3 tokens, at most 4 tokens a window."""
    start, stop, target_end = cut_text(np.array([0, 10]), np.array([10, 13]), 4)
    assert start.tolist() == [0, 4, 8, 10]
    assert stop.tolist() == [4, 8, 10, 13]
    assert target_end.tolist() == [5, 9, 10, 13]
    assert (target_end - start - 1).sum() == 9 + 2


def test_targets_are_counted_in_every_range_of_a_mask() -> None:
    mask = np.array([1, 0, 1, 1, 1, 1, 0, 1, 1, 1], np.uint8)
    counts = count_targets(mask, np.array([1, 6, 10]), np.array([4, 10, 10]))
    assert counts.tolist() == [2, 3, 0]


def test_a_row_is_filled_until_the_next_window_does_not_fit() -> None:
    """The worked example of `pack_rows`, and the picture of its module."""
    assert pack_rows(np.array([6, 3, 4, 4, 8]), max_length=9).tolist() == [0, 2, 4, 5]


def test_an_epoch_packs_every_document_once(alpaca_dataset):
    _, prefix = alpaca_dataset
    plan = plan_of(prefix, epochs=1.0)
    packed = []
    for step in range(plan.total_steps):
        packed += documents_of(plan.micro_batches(step))
    assert sorted(packed) == sorted(all_ids(Dataset(prefix)))


def test_every_label_is_the_next_token_of_its_own_document(alpaca_dataset):
    _, prefix = alpaca_dataset
    dataset = Dataset(prefix)
    mask_of = {}
    for number in range(len(dataset)):
        ids, mask = document(dataset, number)
        mask_of[tuple(ids.tolist())] = mask
    for batch in plan_of(prefix).micro_batches(0):
        bounds = np.cumsum([0, *batch.lengths])
        for start, end in pairwise(bounds):
            ids = batch.tokens[start:end]
            labels = batch.labels[start:end]
            mask = mask_of[tuple(ids.tolist())]
            assert labels[-1] == -100
            assert (labels[:-1] == np.where(mask[1:], ids[1:], -100)).all()


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_any_split_into_micro_batches_and_ranks_trains_on_the_same_tokens(alpaca_dataset, micro):
    _, prefix = alpaca_dataset
    whole = plan_of(prefix, rows_per_micro_batch=4)
    split = plan_of(prefix, rows_per_micro_batch=micro)
    assert whole.total_steps == split.total_steps
    for step in range(whole.total_steps):
        expected = whole.micro_batches(step)
        batches = split.micro_batches(step)
        of_two_ranks = documents_of(batches[0::2]) + documents_of(batches[1::2])
        assert sorted(documents_of(batches)) == sorted(documents_of(expected))
        assert sorted(of_two_ranks) == sorted(documents_of(expected))
        num_targets = sum(batch.targets for batch in batches)
        assert num_targets == sum(batch.targets for batch in expected)


def test_a_step_needs_no_memory_of_the_steps_before_it(alpaca_dataset):
    _, prefix = alpaca_dataset
    plan = plan_of(prefix)
    steps = [documents_of(plan.micro_batches(step)) for step in range(plan.total_steps)]
    for step in reversed(range(plan.total_steps)):
        assert documents_of(plan_of(prefix).micro_batches(step)) == steps[step]
    other_seed = plan_of(prefix, seed=4)
    assert steps != [documents_of(other_seed.micro_batches(step)) for step in range(len(steps))]


def test_the_cut_rule_shortens_instruction_data_and_continues_text(tmp_path, alpaca_dataset):
    cut = TrainingWindows(Dataset(alpaca_dataset[1]), 150)
    lengths = np.diff(Dataset(alpaca_dataset[1]).offsets)
    assert cut.shortened == (lengths > 150).sum() > 0
    assert cut.length.sum() == np.minimum(lengths, 150).sum()
    write_dataset(tmp_path / "text", [(list(range(10)), None)], 10)
    windows = TrainingWindows(Dataset(tmp_path / "text"), 4)
    assert [windows.batch(np.array([i])).labels.tolist() for i in range(3)] == [
        [1, 2, 3, 4],
        [5, 6, 7, 8],
        [9, -100],
    ]
    assert windows.targets.sum() == 9  # every token but the first is predicted once


def test_prompts_that_fill_max_length_stop_the_run(alpaca_dataset):
    message = "of 40 documents have nothing to train on within max_length = 20 tokens; raise max_l"
    with pytest.raises(UserError, match=message):
        TrainingWindows(Dataset(alpaca_dataset[1]), 20)


def test_show_batch_marks_what_is_trained_on(alpaca_dataset, small_tokenizer):
    batch = plan_of(alpaca_dataset[1], rows_per_step=1, rows_per_micro_batch=1).micro_batches(0)[0]
    text = show_batch(small_tokenizer, batch)
    assert text.count("### Response:⟦") == text.count("</s>⟧") == len(batch.lengths)
    assert "<s>Below is an instruction" in text and f"{batch.targets} trained on" in text
    assert show_batch(small_tokenizer, batch, color=True).count("\033[32m") == len(batch.lengths)
    one = replace(batch, tokens=batch.tokens[:3], labels=np.array([-100, 5, -100]), lengths=[3])
    assert "3 tokens, 1 trained on" in show_batch(small_tokenizer, one)
