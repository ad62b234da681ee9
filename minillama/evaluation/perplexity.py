"""Perplexity: exp of the mean -log p(token | what came before), over the tokens of a text.

A text longer than the context is read in windows, so the number depends on how they lie. Here each token is predicted once, windows are
disjoint, each begins with the last token of the one before, and the last one reaches back to fill its context: the rolling likelihood of
lm-evaluation-harness. Bits per byte do not depend on the tokenizer; perplexity does.
"""

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

from minillama.errors import UserError
from minillama.evaluation.questions import TASKS, read_jsonl, read_text, sha256
from minillama.evaluation.scoring import Query, Reading
from minillama.tokenizer import Tokenizer

Record = dict[str, Any]


class Perplexity:
    """Documents in windows; the same methods as `choices.Choices`."""

    measure = "nats per token"

    def __init__(self, options: Namespace, tokenizer: Tokenizer, max_length: int) -> None:
        path = Path(options.data)
        if not path.is_file():
            raise UserError(f"{path}: no such file; --task perplexity reads {TASKS['perplexity'].layout}")
        self.about = {"protocol": "rolling", "n_shots": 0, "split": TASKS["perplexity"].split}
        self.hashes, self.queries = {path.name: sha256(path)}, {}
        texts = [_text(path, line, row) for line, row in read_jsonl(path)] if path.suffix == ".jsonl" else [read_text(path)]
        texts = texts[:options.limit or None]
        self.bytes = sum(len(text.encode()) for text in texts)
        for number, text in enumerate(texts):
            ids = [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id, *tokenizer.encode(text)]
            for start in range(0, len(ids) - 1, max_length):
                end = min(start + max_length, len(ids) - 1)
                self.queries[f"{number}/{start}"] = Query(ids[max(0, end - max_length):start + 1], [ids[start + 1:end + 1]])
        if not self.queries:
            raise UserError(f"{path}: holds no text")

    def judge(self, id: str, reading: Reading) -> Record:
        return {"tokens": len(self.queries[id].continuations[0]), "scores": {"text": reading.logprobs[0]}}

    def worth(self, record: Record) -> float:
        return -record["scores"]["text"] / record["tokens"]

    def summarise(self, records: list[Record]) -> Record:
        tokens, nats = sum(r["tokens"] for r in records), -math.fsum(r["scores"]["text"] for r in records)
        return {"n": tokens, "accuracy": None, "stderr": None, "majority": None, "subjects": {}, "perplexity": math.exp(nats / tokens),
                "loss": nats / tokens, "bits_per_byte": nats / math.log(2) / self.bytes}

    def table(self, summary: Record, reference: Record | None) -> str:
        lines = [f"{'':20}{'here':>12}" + (f"{'reference':>12}{'difference':>12}" if reference else "")]
        for name in ("perplexity", "loss", "bits_per_byte"):
            there = (reference or {}).get(name)
            compared = "" if there is None else f"{there:>12.4f}{summary[name] - there:>+12.4f}"
            lines.append(f"{name:20}{summary[name]:>12.4f}{compared}")
        return "\n".join([*lines, f"{'tokens':20}{summary['n']:>12}"])


def _text(path: Path, line: int, row: dict[str, Any]) -> str:
    if not isinstance(row.get("text"), str):
        raise UserError(f"{path} line {line}: lacks the string \"text\"")
    return row["text"]
