"""The first batch, as text, with what is trained on marked: the shortest way to see a wrong template or mask.

    <s>Below is an instruction … ### Response:⟦ Paris</s>⟧

A token is marked where it is the label of the one before it. Control tokens, which text can never hold, are shown by name.
"""

from itertools import islice, pairwise

import numpy as np

from minillama.data.batches import Batch
from minillama.tokenizer import Stream, Tokenizer


def show_batch(tokenizer: Tokenizer, batch: Batch, color: bool = False, most_documents: int = 8) -> str:
    """The batch's documents, a paragraph each, and its totals. color: mark by colour, for a terminal, else by ⟦ ⟧."""
    before, after = ("\033[32m", "\033[0m") if color else ("⟦", "⟧")
    names = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    paragraphs = []
    for number, (start, end) in enumerate(islice(pairwise(np.cumsum([0, *batch.lengths])), most_documents), 1):
        trained = np.append(False, batch.labels[start:end - 1] >= 0)
        edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), end - start]
        stream, text = Stream(tokenizer), ""
        for left, right in pairwise(edges):
            part = "".join(names.get(token) or stream.push(token) for token in batch.tokens[start + left:start + right].tolist())
            text += f"{before}{part}{after}" if trained[left] else part
        paragraphs.append(f"--- document {number}: {end - start} tokens, {int(trained.sum())} trained on\n{text}{stream.flush()}")
    if len(batch.lengths) > most_documents:
        paragraphs.append(f"--- and {len(batch.lengths) - most_documents} more")
    total = f"{len(batch.lengths)} documents, {len(batch.tokens)} tokens, {batch.targets} trained on"
    return "\n".join([*paragraphs, f"--- batch: {total} ({batch.targets / max(1, len(batch.tokens)):.0%})"])
