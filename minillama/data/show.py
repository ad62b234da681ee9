"""The first batch, as text, with what is trained on marked: the shortest way to see a wrong template or mask.

    <s>Below is an instruction … ### Response:⟦ Paris</s>⟧

A token is marked where it is the label of the one before it. Control tokens, which text can never hold, are shown by name.
"""

from itertools import groupby, pairwise
from operator import itemgetter

import numpy as np

from minillama.data.batches import Batch
from minillama.tokenizer import Stream, Tokenizer

MOST_DOCUMENTS = 8


def show_batch(tokenizer: Tokenizer, batch: Batch, color: bool = False) -> str:
    """The batch's documents, a paragraph each, and its totals. color: mark by colour, for a terminal, else by ⟦ ⟧."""
    before, after = ("\033[32m", "\033[0m") if color else ("⟦", "⟧")
    names = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    paragraphs = []
    for number, (start, end) in enumerate(pairwise(np.cumsum([0, *batch.lengths[:MOST_DOCUMENTS]])), 1):
        trained = [False, *(batch.labels[start:end - 1] >= 0).tolist()]
        stream, text = Stream(tokenizer), ""
        for is_trained, run in groupby(zip(trained, batch.tokens[start:end].tolist(), strict=True), key=itemgetter(0)):
            part = "".join(names.get(token) or stream.push(token) for _, token in run)
            text += f"{before}{part}{after}" if is_trained else part
        paragraphs.append(f"--- document {number}: {end - start} tokens, {sum(trained)} trained on\n{text}{stream.flush()}")
    if len(batch.lengths) > MOST_DOCUMENTS:
        paragraphs.append(f"--- and {len(batch.lengths) - MOST_DOCUMENTS} more")
    total = f"{len(batch.lengths)} documents, {len(batch.tokens)} tokens, {batch.targets} trained on"
    return "\n".join([*paragraphs, f"--- batch: {total} ({batch.targets / max(1, len(batch.tokens)):.0%})"])
