"""Perplexity: exp of the mean -log p(token | what came before). Bits per byte say the same without depending on the tokenizer.

A text longer than the context is read in windows, as lm-evaluation-harness rolls over it: each token is predicted once, a window begins
with the last token of the one before, and the last one reaches back to fill its context.
"""

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

from minillama.data import containers
from minillama.data.sources import hash_of
from minillama.errors import UserError
from minillama.evaluation.scoring import Query, Reading
from minillama.tokenizer import Tokenizer


class Perplexity:
    """A test with the methods of `choices.Choices`: documents in windows."""

    measure, about = "nats per token", {"protocol": "rolling", "n_shots": 0, "split": "whole"}

    def __init__(self, options: Namespace, tokenizer: Tokenizer, max_length: int) -> None:
        path, first = Path(options.data), tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if not path.is_file():
            raise UserError(f"{path}: no such file; give a .txt, or a .jsonl with \"text\"")
        self.hashes, self.queries, self.bytes = {path.name: hash_of(path)}, {}, 0
        for number, (place, row) in enumerate(list(containers.records(path))[:options.limit or None]):
            if not isinstance(text := row.get("text") if isinstance(row, dict) else row, str):
                raise UserError(f"{path} {place}: lacks the string \"text\" ({row!s:.120})")
            ids = [first, *tokenizer.encode(text)]
            self.bytes += len(text.encode())
            for start in range(0, len(ids) - 1, max_length):
                end = min(start + max_length, len(ids) - 1)
                self.queries[f"{number}/{start}"] = Query(ids[max(0, end - max_length):start + 1], [ids[start + 1:end + 1]])

    def judge(self, id: str, reading: Reading) -> dict[str, Any]:
        return {"tokens": len(self.queries[id].continuations[0]), "scores": {"text": reading.logprobs[0]}}

    def worth(self, record: dict[str, Any]) -> float:
        return -record["scores"]["text"] / record["tokens"]

    def summarise(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        tokens, nats = sum(r["tokens"] for r in records), -math.fsum(r["scores"]["text"] for r in records)
        return {"n": tokens, "accuracy": None, "stderr": None, "majority": None, "subjects": {}, "perplexity": math.exp(nats / tokens),
                "loss": nats / tokens, "bits_per_byte": nats / math.log(2) / self.bytes}

    @staticmethod
    def show(summary: dict[str, Any], reference: dict[str, Any] | None) -> str:
        names = ("perplexity", "loss", "bits_per_byte")
        there = {name: f"   reference {reference[name]:.4f}, difference {summary[name] - reference[name]:+.4f}" if reference else ""
                 for name in names}
        return "\n".join(f"{name:15}{summary[name]:>12.4f}{there[name]}" for name in names)
