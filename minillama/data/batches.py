"""Which tokens make up step t: an order that depends on (seed, epoch, step) alone.

A document longer than `max_length` is cut: instruction data loses its end, plain text goes on in another piece. The pieces of an
epoch are shuffled by a counter-based generator and laid end to end into rows of at most `max_length` tokens; `rows_per_step` rows
make a global batch, `rows_per_micro_batch` of them a micro-batch. Nothing here knows about ranks: a rank takes its micro-batches
out of the same global batch, so step t trains on the same tokens on any number of ranks, and a resumed run needs only t.

    row 0   a a a a a a | b b b          micro-batch 0 = rows 0, 1
    row 1   c c c c | d d d d
    row 2   e e e e e e e e              micro-batch 1 = row 2 (the last global batch of an epoch may be short)
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby, pairwise
from math import ceil
from operator import itemgetter

import numpy as np

from minillama.data.memmap import MOST_WITHOUT_TARGET, Dataset
from minillama.errors import UserError
from minillama.ops.reference import IGNORE
from minillama.tokenizer import Stream, Tokenizer

SHOWN = 8  # documents of a batch


@dataclass(frozen=True)
class Batch:
    """Documents end to end. labels[i] is the token after tokens[i] where that one is trained on, else IGNORE."""

    tokens: np.ndarray  # (T,) int64
    labels: np.ndarray  # (T,) int64
    lengths: list[int]  # of the documents; sum T

    @property
    def targets(self) -> int:
        return int((self.labels != IGNORE).sum())


class Pieces:
    """The stretches of a data set that are trained on: start (in all tokens), length and targets of each.

    Documents whose targets all lie beyond max_length are left out and counted; more than one in a hundred stops the run.
    """

    def __init__(
        self, dataset: Dataset, max_length: int, documents: np.ndarray | None = None
    ) -> None:
        """documents: the numbers of those to use; None: all. Raises UserError where none has a target."""
        self.dataset, self.max_length = dataset, max_length
        numbers = np.arange(len(dataset)) if documents is None else documents
        start, end = dataset.offsets[numbers], dataset.offsets[numbers + 1]
        self.documents, self.shortened = (
            len(numbers),
            0 if dataset.mask is None else int((end - start > max_length).sum()),
        )
        if dataset.mask is None:
            counts = np.maximum(
                1, -(-(end - start - 1) // max_length)
            )  # a piece predicts the first token of the next
            inner = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
            start, end = np.repeat(start, counts) + inner * max_length, np.repeat(end, counts)
        stop = np.minimum(end, start + max_length)
        behind = np.minimum(
            end, stop + (dataset.mask is None)
        )  # of the last token that is predicted
        targets = behind - start - 1
        if dataset.mask is not None:
            padded = np.append(dataset.mask, np.uint8(0))  # reduceat wants every bound inside
            sums = np.add.reduceat(
                padded, np.stack((start + 1, behind), axis=1).ravel(), dtype=np.int64
            )[::2]
            targets = np.where(targets > 0, sums, 0)
        kept = targets > 0
        self.start, self.length, self.behind, self.targets = (
            start[kept],
            (stop - start)[kept],
            behind[kept],
            targets[kept],
        )
        self.left_out = int((~kept).sum())
        too_many = dataset.mask is not None and self.left_out > MOST_WITHOUT_TARGET * max(
            100, len(numbers)
        )
        if too_many or not kept.any():
            raise UserError(
                f"{dataset.prefix}: {self.left_out} of {len(numbers)} documents have nothing to train on "
                f"within max_length = {max_length} tokens; raise max_length, or shorten the prompts"
            )

    def summary(self) -> str:
        """What is trained on, and what max_length did to the documents."""
        return (
            f"{self.documents:,} documents, {self.length.sum():,} tokens, {self.targets.sum():,} of them targets"
            + (
                f"; {self.shortened:,} cut at max_length {self.max_length}"
                if self.shortened
                else ""
            )
            + (
                f"; {self.left_out:,} left out: no target within max_length"
                if self.left_out
                else ""
            )
        )

    def batch(self, chosen: np.ndarray) -> Batch:
        """The pieces of these numbers, end to end."""
        start, length, behind = self.start[chosen], self.length[chosen], self.behind[chosen]
        here = np.arange(length.sum()) + np.repeat(
            start + length - length.cumsum(), length
        )  # each token's place in the data set
        after = np.minimum(here + 1, len(self.dataset.tokens) - 1)
        trained = here + 1 < np.repeat(behind, length)
        if self.dataset.mask is not None:
            trained &= self.dataset.mask[after] != 0
        tokens, following = (
            self.dataset.tokens[places].astype(np.int64) for places in (here, after)
        )
        return Batch(tokens, np.where(trained, following, IGNORE), length.tolist())


class BatchPlan:
    """The batches of a run, by step."""

    def __init__(
        self,
        pieces: Pieces,
        *,
        rows_per_step: int,
        rows_per_micro_batch: int,
        seed: int,
        packing: bool = True,
        epochs: float = 1.0,
        max_steps: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.pieces, self.seed, self.packing, self.shuffle = pieces, seed, packing, shuffle
        self.rows_per_step, self.rows_per_micro_batch = rows_per_step, rows_per_micro_batch
        self._epoch, self._steps_of = lru_cache(maxsize=1)(self._lay_out), cache(self._count_steps)
        whole = int(epochs)
        part = (
            ceil(round((epochs - whole) * self._steps_of(whole), 6))
            if epochs > whole and not max_steps
            else 0
        )
        self.total_steps = max_steps or max(1, sum(map(self._steps_of, range(whole))) + part)

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(order of the pieces, bounds of the rows in it) of an epoch."""
        n = len(self.pieces.length)
        order = (
            np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(n)
            if self.shuffle
            else np.arange(n)
        )
        return order, _fill_rows(
            self.pieces.length[order], self.pieces.max_length
        ) if self.packing else np.arange(n + 1)

    def _count_steps(self, epoch: int) -> int:
        return ceil((len(self._epoch(epoch)[1]) - 1) / self.rows_per_step)

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of a step counted from 0."""
        epoch = 0
        while step >= self._steps_of(epoch):
            step -= self._steps_of(epoch)
            epoch += 1
        return epoch, step

    def epoch_at(self, steps_done: int) -> float:
        """How many epochs `steps_done` updates are."""
        epoch, inner = self.locate(steps_done)
        return epoch + inner / self._steps_of(epoch)

    def micro_batches(self, step: int) -> list[Batch]:
        """The global batch of a step, as its micro-batches in order."""
        epoch, inner = self.locate(step)
        order, bounds = self._epoch(epoch)
        last, size = (
            min((inner + 1) * self.rows_per_step, len(bounds) - 1),
            self.rows_per_micro_batch,
        )
        firsts = range(inner * self.rows_per_step, last, size)
        return [
            self.pieces.batch(order[bounds[row] : bounds[min(row + size, last)]]) for row in firsts
        ]


def _fill_rows(lengths: np.ndarray, max_length: int) -> np.ndarray:
    """Bounds of rows that take the pieces in order while they fit: row r is pieces bounds[r] to bounds[r + 1]."""
    starts, bounds = np.append(0, lengths.cumsum()), [0]
    while bounds[-1] < len(lengths):
        bounds.append(
            int(np.searchsorted(starts, starts[bounds[-1]] + max_length, side="right")) - 1
        )
    return np.asarray(bounds)


def split_documents(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) document numbers: `fraction` of them, at least one, held out by the seed alone."""
    held_out = max(1, round(count * fraction))
    if held_out >= count:
        raise UserError(
            f"validation_split = {fraction} of {count} documents leaves none to train on"
        )
    order = np.random.Generator(np.random.Philox(key=[seed, 2**32])).permutation(count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def show_batch(tokenizer: Tokenizer, batch: Batch, color: bool = False) -> str:
    """The batch's first documents as text, a paragraph each, and its totals: the shortest way to see a wrong template or mask.

    What is trained on is marked, by ⟦ ⟧ or by colour, and control tokens are shown by name: `### Response:⟦ Paris</s>⟧`.
    """
    before, after = ("\033[32m", "\033[0m") if color else ("⟦", "⟧")
    names = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    paragraphs = []
    for number, (start, end) in enumerate(pairwise(np.cumsum([0, *batch.lengths[:SHOWN]])), 1):
        trained = [False, *(batch.labels[start : end - 1] >= 0).tolist()]
        stream, text = Stream(tokenizer), ""
        for is_trained, run in groupby(
            zip(trained, batch.tokens[start:end].tolist(), strict=True), key=itemgetter(0)
        ):
            part = "".join(names.get(token) or stream.push(token) for _, token in run)
            text += f"{before}{part}{after}" if is_trained else part
        paragraphs.append(
            f"--- document {number}: {end - start} tokens, {sum(trained)} trained on\n{text}{stream.flush()}"
        )
    if len(batch.lengths) > SHOWN:
        paragraphs.append(f"--- and {len(batch.lengths) - SHOWN} more")
    total = (
        f"{len(batch.lengths)} documents, {len(batch.tokens)} tokens, {batch.targets} trained on"
    )
    return "\n".join(
        [*paragraphs, f"--- batch: {total} ({batch.targets / max(1, len(batch.tokens)):.0%})"]
    )
