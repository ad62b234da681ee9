"""Perplexity: exp of the mean -log p(token | what came before). Bits per byte say the same without depending on the tokenizer.

A text longer than the context is read in windows. Each token is predicted once: windows are disjoint, each begins with the last token of
the one before, and the last reaches back to fill its context, as in the rolling likelihood of lm-evaluation-harness.
"""

import hashlib
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

from minillama.errors import UserError
from minillama.evaluation.scoring import Query, Reading
from minillama.evaluation.tasks import read_jsonl, read_text
from minillama.tokenizer import Tokenizer


class Perplexity:
    """A test with the methods of `choices.Choices`: documents in windows."""

    measure, about = "nats per token", {"protocol": "rolling", "n_shots": 0, "split": "whole"}

    def __init__(self, options: Namespace, tokenizer: Tokenizer, max_length: int) -> None:
        path = Path(options.data)
        texts = dict(read_jsonl(path)) if path.suffix == ".jsonl" else {1: {"text": read_text(path)}}
        if bad := [line for line, row in texts.items() if not isinstance(row.get("text"), str)]:
            raise UserError(f'{path} line {bad[0]}: lacks the string "text"')
        texts = [row["text"] for row in texts.values()][:options.limit or None]
        self.hashes, self.queries = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}, {}
        self.bytes = sum(len(text.encode()) for text in texts)
        for number, text in enumerate(texts):
            ids = [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id, *tokenizer.encode(text)]
            for start in range(0, len(ids) - 1, max_length):
                end = min(start + max_length, len(ids) - 1)
                self.queries[f"{number}/{start}"] = Query(ids[max(0, end - max_length):start + 1], [ids[start + 1:end + 1]])
        if not self.queries:
            raise UserError(f"{path}: holds no text")

    def judge(self, id: str, reading: Reading) -> dict[str, Any]:
        return {"tokens": len(self.queries[id].continuations[0]), "scores": {"text": reading.logprobs[0]}}

    def worth(self, record: dict[str, Any]) -> float:
        return -record["scores"]["text"] / record["tokens"]

    def summarise(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        tokens, nats = sum(r["tokens"] for r in records), -math.fsum(r["scores"]["text"] for r in records)
        return {"n": tokens, "accuracy": None, "stderr": None, "majority": None, "subjects": {}, "perplexity": math.exp(nats / tokens),
                "loss": nats / tokens, "bits_per_byte": nats / math.log(2) / self.bytes}

    def show(self, summary: dict[str, Any], reference: dict[str, Any] | None) -> str:
        compared = {name: f"   reference {reference[name]:.4f}, difference {summary[name] - reference[name]:+.4f}"
                    for name in ("perplexity", "loss", "bits_per_byte") if reference and name in reference}
        return "\n".join(f"{name:15}{summary[name]:>12.4f}{compared.get(name, '')}" for name in ("perplexity", "loss", "bits_per_byte"))
