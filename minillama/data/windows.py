"""Training windows: the parts of documents, at most `max_length` tokens long, that are trained on.

A document can be longer than the model's context, so it is cut.

    instruction data    the first max_length tokens; what is beyond them is lost, and counted
    plain text          window after window, until the document ends

A data set has millions of documents, so windows are kept as arrays, one number a window, and
computed by numpy for all documents at once. Each such function has a small example worked out.
"""

from dataclasses import dataclass

import numpy as np

from minillama.data.memmap import MAX_DROPPED, Dataset
from minillama.errors import UserError
from minillama.ops.reference import IGNORE


@dataclass(frozen=True)
class Batch:
    """Documents, one after another. labels[i] is tokens[i + 1] if it is trained on, else IGNORE."""

    tokens: np.ndarray  # (T,) int64
    labels: np.ndarray  # (T,) int64
    lengths: list[int]  # of the documents; their sum is T

    @property
    def targets(self) -> int:
        return int((self.labels != IGNORE).sum())


class TrainingWindows:
    """The parts of a data set that are trained on.

    Window i is the tokens start[i] to start[i] + length[i] of the data set. It predicts those from
    start[i] + 1 up to, not including, target_end[i]; targets[i] of them are trained on.
    """

    def __init__(
        self,
        dataset: Dataset,
        max_length: int,
        documents: np.ndarray | None = None,
        max_dropped: float = MAX_DROPPED,
    ) -> None:
        """Cut documents into windows. documents: the numbers of those to use; None means all.

        A window without a target is left out and counted. Raises UserError if none is left, and for
        instruction data if a larger share of documents than max_dropped is left out.
        """
        self.dataset = dataset
        self.max_length = max_length
        if documents is None:
            documents = np.arange(len(dataset))
        self.documents = len(documents)
        start = dataset.offsets[documents]
        end = dataset.offsets[documents + 1]
        if dataset.mask is None:
            self.shortened = 0
            start, stop, target_end = cut_text(start, end, max_length)
            targets = target_end - start - 1
        else:
            self.shortened = int((end - start > max_length).sum())
            stop = np.minimum(end, start + max_length)
            target_end = stop
            first_target = np.minimum(start + 1, target_end)  # a document can be empty
            targets = count_targets(dataset.mask, first_target, target_end)
        has_target = targets > 0
        self.start = start[has_target]
        self.length = (stop - start)[has_target]
        self.target_end = target_end[has_target]
        self.targets = targets[has_target]
        self.left_out = int((~has_target).sum())
        self._check_left_out(max_dropped)

    def _check_left_out(self, max_dropped: float) -> None:
        is_instruction_data = self.dataset.mask is not None
        too_many = is_instruction_data and self.left_out > max_dropped * self.documents
        if too_many or len(self.start) == 0:
            raise UserError(
                f"{self.dataset.prefix}: {self.left_out} of {self.documents} documents have "
                f"nothing to train on within max_length = {self.max_length} tokens; raise "
                "max_length, shorten the prompts, or leave more out: raise max_dropped, now "
                f"{max_dropped:g}"
            )

    def summary(self) -> str:
        """Describe what is trained on, and what max_length did to the documents."""
        text = (
            f"{self.documents:,} documents, {self.length.sum():,} tokens, "
            f"{self.targets.sum():,} of them targets"
        )
        if self.shortened:
            text += f"; {self.shortened:,} cut at max_length {self.max_length}"
        if self.left_out:
            text += f"; {self.left_out:,} left out: no target within max_length"
        return text

    def batch(self, chosen: np.ndarray) -> Batch:
        """The windows with these numbers, one after another."""
        start = self.start[chosen]
        length = self.length[chosen]
        target_end = self.target_end[chosen]
        position = join_ranges(start, length)  # (T,) in the tokens of the data set
        next_position = position + 1
        is_target = next_position < np.repeat(target_end, length)
        # The last position has no next one. It is no target: any position in the file will do.
        next_position = np.minimum(next_position, len(self.dataset.tokens) - 1)
        if self.dataset.mask is not None:
            is_target &= self.dataset.mask[next_position] != 0
        tokens = self.dataset.tokens[position].astype(np.int64)
        next_tokens = self.dataset.tokens[next_position].astype(np.int64)
        labels = np.where(is_target, next_tokens, IGNORE)
        return Batch(tokens, labels, length.tolist())


def join_ranges(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The integers from start[i] to start[i] + length[i], for each i, one range after another.

    start [4, 10] and length [4, 3] give [4, 5, 6, 7, 10, 11, 12]: numbers that count up, plus a
    shift that is constant in each range.

        arange            0  1  2  3    4  5  6
        shift             4  4  4  4    6  6  6
    """
    position_of_first = length.cumsum() - length  # where each range begins in the result: [0, 4]
    shift = np.repeat(start - position_of_first, length)
    return np.arange(length.sum()) + shift


def cut_text(
    start: np.ndarray, end: np.ndarray, max_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut plain text into windows: (start, stop, target_end) of each.

    A window also predicts the first token of the next window, so that every token of a document
    but its first is predicted once. Documents of 10 and 3 tokens, with max_length 4:

        document          0  0  0  1
        number            0  1  2  0     of the window in its document
        start             0  4  8  10
        stop              4  8  10 13
        target_end        5  9  10 13
    """
    num_targets = end - start - 1
    num_windows = np.maximum(1, -(-num_targets // max_length))  # division that rounds up
    number = join_ranges(np.zeros_like(num_windows), num_windows)
    document_end = np.repeat(end, num_windows)
    window_start = np.repeat(start, num_windows) + number * max_length
    stop = np.minimum(document_end, window_start + max_length)
    target_end = np.minimum(document_end, stop + 1)
    return window_start, stop, target_end


def count_targets(mask: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """How many of mask[start[i]:end[i]] are 1, for each i.

    np.add.reduceat(mask, bounds) sums mask from each bound to the next, and from the last bound to
    the end. Two windows, 1 to 4 and 6 to 9, have the bounds [1, 4, 6, 9]; the sums are those of

        mask[1:4]   mask[4:6]   mask[6:9]   mask[9:]

    and every second one belongs to a window.
    """
    bounds = np.stack((start, end), axis=1).ravel()  # (2 * windows,)
    padded = np.append(mask, np.uint8(0))  # a bound may be the end of the mask
    sums = np.add.reduceat(padded, bounds, dtype=np.int64)  # (2 * windows,)
    return np.where(start < end, sums[::2], 0)  # for an empty range reduceat gives one element
