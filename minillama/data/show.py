"""A batch as text: the shortest way to see a wrong template or a wrong mask.

What is trained on is marked, and control tokens are shown by name:

    <s>… ### Instruction: What is the capital of France? ### Response:⟦ Paris</s>⟧
"""

from itertools import pairwise

import numpy as np

from minillama.data.windows import Batch
from minillama.ops.reference import IGNORE
from minillama.tokenizer import Stream, Tokenizer

MAX_SHOWN = 8  # documents
GREEN = "\033[32m"
RESET = "\033[0m"


def show_batch(tokenizer: Tokenizer, batch: Batch, color: bool = False) -> str:
    """The batch's first documents as text, a paragraph each, and its totals.

    color: mark by a terminal's colour what is trained on, and not by ⟦ ⟧.
    """
    marks = (GREEN, RESET) if color else ("⟦", "⟧")
    bounds = np.cumsum([0, *batch.lengths[:MAX_SHOWN]])
    paragraphs = []
    for number, (start, end) in enumerate(pairwise(bounds), start=1):
        tokens = batch.tokens[start:end].tolist()
        # labels[i] is the next token, so the label of token i stands at i - 1
        is_target = [False, *(batch.labels[start : end - 1] != IGNORE).tolist()]
        head = f"--- document {number}: {end - start} tokens, {sum(is_target)} trained on"
        paragraphs.append(f"{head}\n{_marked_text(tokenizer, tokens, is_target, marks)}")
    num_documents = len(batch.lengths)
    if num_documents > MAX_SHOWN:
        paragraphs.append(f"--- and {num_documents - MAX_SHOWN} more")
    num_tokens = len(batch.tokens)
    share = batch.targets / max(1, num_tokens)
    paragraphs.append(
        f"--- batch: {num_documents} documents, {num_tokens} tokens, "
        f"{batch.targets} trained on ({share:.0%})"
    )
    return "\n".join(paragraphs)


def _marked_text(
    tokenizer: Tokenizer, tokens: list[int], is_target: list[bool], marks: tuple[str, str]
) -> str:
    """The text of one document, with a mark before and after each run of targets."""
    control_names = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    opening, closing = marks
    stream = Stream(tokenizer)
    text = ""
    was_target = False
    for token, target in zip(tokens, is_target, strict=True):
        if target != was_target:
            text += opening if target else closing
        text += control_names.get(token) or stream.push(token)
        was_target = target
    if was_target:
        text += closing
    return text + stream.flush()
