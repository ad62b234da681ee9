"""Batches: every step is a function of its number, on any number of ranks."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from minillama.data.batches import BatchPlan, pack_rows, philox, split_documents
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
    """Steps computed backwards, each by a new plan, are the steps computed in order."""
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


def test_records_whose_answer_is_cut_off_are_left_out_up_to_a_share(tmp_path):
    """Some documents have the prompt 0 1 2 3, others 0. The answer is the last token."""
    too_long = ([0, 1, 2, 3, 4], [0, 0, 0, 0, 1])
    short = ([0, 4], [0, 1])
    write_dataset(tmp_path / "two", [too_long] * 2 + [short] * 18, 10)
    windows = TrainingWindows(Dataset(tmp_path / "two"), 4)  # a tenth is allowed
    assert (windows.left_out, len(windows.start), windows.targets.sum()) == (2, 18, 18)
    assert "2 left out: no target within max_length" in windows.summary()
    write_dataset(tmp_path / "three", [too_long] * 3 + [short] * 17, 10)
    three = Dataset(tmp_path / "three")
    message = "3 of 20 documents have nothing .* raise max_dropped, now 0.1"
    with pytest.raises(UserError, match=message):
        TrainingWindows(three, 4)
    assert TrainingWindows(three, 4, max_dropped=0.15).left_out == 3
    with pytest.raises(UserError, match=r"1 of 20 documents .* now 0$"):
        write_dataset(tmp_path / "one", [too_long] + [short] * 19, 10)
        TrainingWindows(Dataset(tmp_path / "one"), 4, max_dropped=0.0)
    write_dataset(tmp_path / "all", [too_long] * 20, 10)
    with pytest.raises(UserError, match="20 of 20 documents have nothing"):
        TrainingWindows(Dataset(tmp_path / "all"), 4, max_dropped=0.99)


def test_the_first_token_of_a_document_is_no_target_whatever_its_mask(tmp_path):
    """Megatron's labels can name it, and a document of one token has nothing else."""
    documents = [([0, 4, 5], [1, 0, 1])] * 10 + [([0], [1])] + [([0, 4, 5], [1, 0, 1])] * 9
    write_dataset(tmp_path / "set", documents, 10)
    windows = TrainingWindows(Dataset(tmp_path / "set"), 4)
    assert windows.left_out == 1
    assert windows.targets.tolist() == [1] * 19
    assert [windows.batch(np.array([i])).targets for i in range(19)] == [1] * 19


@pytest.mark.parametrize(
    ("count", "fraction", "num_held_out"), [(10, 0.16, 2), (10, 0.14, 1), (10, 0.01, 1)]
)
def test_the_share_that_is_held_out_is_rounded_and_at_least_one(count, fraction, num_held_out):
    assert len(split_documents(count, fraction, seed=1)[1]) == num_held_out


def test_what_is_held_out_is_not_the_beginning_of_an_epochs_order():
    _, held_out = split_documents(40, 0.25, seed=1)
    for epoch in range(3):
        assert sorted(philox(1, epoch).permutation(40)[:10]) != held_out.tolist()


def test_steps_are_counted_in_epochs(tmp_path):
    write_dataset(tmp_path / "set", [([0, 1], None)] * 4, 10)
    windows = TrainingWindows(Dataset(tmp_path / "set"), 2)
    plan = BatchPlan(windows, rows_per_step=1, rows_per_micro_batch=1, seed=0, epochs=2)
    assert [plan.epoch_at(steps) for steps in (0, 1, 4, 6)] == [0, 0.25, 1, 1.5]


def test_a_held_out_document_is_never_trained_on(alpaca_dataset):
    trained, held_out = split_documents(40, 0.25, seed=1)
    assert len(held_out) == 10
    assert sorted([*trained, *held_out]) == list(range(40))
    dataset = Dataset(alpaca_dataset[1])
    windows = TrainingWindows(dataset, 256, trained)
    assert windows.start.tolist() == dataset.offsets[trained].tolist()
    assert split_documents(40, 0.25, seed=2)[1].tolist() != held_out.tolist()
    with pytest.raises(UserError, match=r"validation_split = 0\.9 of 1 documents leaves none"):
        split_documents(1, 0.9, seed=1)


def test_every_epoch_has_an_order_of_its_own(alpaca_dataset):
    plan = plan_of(alpaca_dataset[1])
    epochs: list[list] = [[], []]
    for step in range(plan.total_steps):
        epoch, _ = plan.locate(step)
        epochs[epoch] += documents_of(plan.micro_batches(step))
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])


@pytest.mark.parametrize(
    ("num_documents", "epochs", "steps"),
    [(5, 0.5, 3), (5, 1.5, 8), (5, 0.2, 1), (30, 0.1, 3), (7, 0.01, 1)],
)
def test_a_part_of_an_epoch_is_rounded_up(tmp_path, num_documents, epochs, steps):
    """One document a step, so an epoch has as many steps as documents."""
    write_dataset(tmp_path / "set", [([0, 1], None)] * num_documents, 10)
    windows = TrainingWindows(Dataset(tmp_path / "set"), 2)
    plan = BatchPlan(
        windows, rows_per_step=1, rows_per_micro_batch=1, seed=0, packing=False, epochs=epochs
    )
    assert plan.total_steps == steps


def test_show_batch_marks_what_is_trained_on(alpaca_dataset, small_tokenizer):
    batch = plan_of(alpaca_dataset[1], rows_per_step=1, rows_per_micro_batch=1).micro_batches(0)[0]
    text = show_batch(small_tokenizer, batch)
    assert text.count("### Response:⟦") == text.count("</s>⟧") == len(batch.lengths)
    assert "<s>Below is an instruction" in text and f"{batch.targets} trained on" in text
    assert show_batch(small_tokenizer, batch, color=True).count("\033[32m") == len(batch.lengths)
    one = replace(batch, tokens=batch.tokens[:3], labels=np.array([-100, 5, -100]), lengths=[3])
    assert "3 tokens, 1 trained on" in show_batch(small_tokenizer, one)
