"""Which tokens make up step t: an order that depends on (seed, epoch, step) alone.

A run that is interrupted, or continued on another number of ranks, must see the same batches. So a
batch is computed from its step number, and nothing has to be remembered.

1. Documents are cut into training windows of at most `max_length` tokens (windows.py).
2. The windows of an epoch are shuffled by a counter-based random generator.
3. They are packed, in that order, into rows of at most `max_length` tokens.
4. `rows_per_step` rows make a global batch, `rows_per_micro_batch` of them a micro-batch.

    row 0   a a a a a a | b b b          micro-batch 0 = rows 0, 1
    row 1   c c c c | d d d d
    row 2   e e e e e e e e              micro-batch 1 = row 2

The last global batch of an epoch may be smaller. This module knows no ranks: a rank takes some
of the micro-batches of the same global batch.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from math import ceil

import numpy as np

from minillama.data.windows import Batch, TrainingWindows
from minillama.errors import UserError


@dataclass(frozen=True)
class EpochOrder:
    """Row r of an epoch is the windows order[row_bounds[r]] to order[row_bounds[r + 1]]."""

    order: np.ndarray  # (windows,) numbers of windows
    row_bounds: np.ndarray  # (rows + 1,)

    @property
    def num_rows(self) -> int:
        return len(self.row_bounds) - 1


class BatchPlan:
    """The batches of a run, by step."""

    def __init__(
        self,
        windows: TrainingWindows,
        *,
        rows_per_step: int,
        rows_per_micro_batch: int,
        seed: int,
        packing: bool = True,
        epochs: float = 1.0,
        max_steps: int = 0,
        shuffle: bool = True,
    ) -> None:
        """max_steps: end after so many steps, and not after `epochs`, which may be a fraction."""
        self.windows = windows
        self.rows_per_step = rows_per_step
        self.rows_per_micro_batch = rows_per_micro_batch
        self.seed = seed
        self.packing = packing
        self.shuffle = shuffle
        self._epoch_order = lru_cache(maxsize=1)(self._make_epoch_order)
        self._steps_in_epoch = cache(self._count_steps)
        self.total_steps = max_steps or self._steps_in_epochs(epochs)

    def _steps_in_epochs(self, epochs: float) -> int:
        whole_epochs = int(epochs)
        steps = sum(self._steps_in_epoch(epoch) for epoch in range(whole_epochs))
        fraction = epochs - whole_epochs
        if fraction > 0:
            exact = fraction * self._steps_in_epoch(whole_epochs)
            steps += ceil(round(exact, 6))  # rounded: 0.1 * 30 is 3.0000000000000004
        return max(1, steps)

    def _make_epoch_order(self, epoch: int) -> EpochOrder:
        num_windows = len(self.windows.length)
        order = np.arange(num_windows)
        if self.shuffle:
            order = philox(self.seed, epoch).permutation(num_windows)
        if self.packing:
            lengths = self.windows.length[order]
            row_bounds = pack_rows(lengths, self.windows.max_length)
        else:
            row_bounds = np.arange(num_windows + 1)  # one window a row
        return EpochOrder(order, row_bounds)

    def _count_steps(self, epoch: int) -> int:
        return ceil(self._epoch_order(epoch).num_rows / self.rows_per_step)

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of a step counted from 0."""
        epoch = 0
        while step >= self._steps_in_epoch(epoch):
            step -= self._steps_in_epoch(epoch)
            epoch += 1
        return epoch, step

    def epoch_at(self, steps_done: int) -> float:
        """How many epochs `steps_done` updates are."""
        epoch, step_in_epoch = self.locate(steps_done)
        return epoch + step_in_epoch / self._steps_in_epoch(epoch)

    def micro_batches(self, step: int) -> list[Batch]:
        """The global batch of a step, as its micro-batches in order."""
        epoch, step_in_epoch = self.locate(step)
        epoch_order = self._epoch_order(epoch)
        first_row = step_in_epoch * self.rows_per_step
        end_row = min(first_row + self.rows_per_step, epoch_order.num_rows)
        batches = []
        for row in range(first_row, end_row, self.rows_per_micro_batch):
            next_row = min(row + self.rows_per_micro_batch, end_row)
            first_window = epoch_order.row_bounds[row]
            end_window = epoch_order.row_bounds[next_row]
            chosen = epoch_order.order[first_window:end_window]
            batches.append(self.windows.batch(chosen))
        return batches


def philox(seed: int, counter: int) -> np.random.Generator:
    """A random generator whose sequence depends on the two numbers alone (Philox, Salmon 2011)."""
    return np.random.Generator(np.random.Philox(key=[seed, counter]))


def pack_rows(lengths: np.ndarray, max_length: int) -> np.ndarray:
    """Fill rows of at most max_length tokens with windows, in order.

    A row ends when the next window does not fit. Row r is the windows bounds[r] to bounds[r + 1].
    lengths [6, 3, 4, 4, 8] and max_length 9 give the bounds [0, 2, 4, 5].
    """
    first_token = np.append(0, lengths.cumsum())  # [0, 6, 9, 13, 17, 25]
    bounds = [0]
    while bounds[-1] < len(lengths):
        row_end = first_token[bounds[-1]] + max_length
        num_fitting = np.searchsorted(first_token, row_end, side="right") - 1
        bounds.append(int(num_fitting))
    return np.asarray(bounds)


def split_documents(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) document numbers. The seed alone decides which are held out.

    `fraction` of the documents, at least one, are for validation.
    """
    num_held_out = max(1, round(count * fraction))
    if num_held_out >= count:
        raise UserError(
            f"validation_split = {fraction} of {count} documents leaves none to train on"
        )
    order = philox(seed, 2**32).permutation(count)  # no epoch has this number
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])
