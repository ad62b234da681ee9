"""Perplexity: how well a model predicts the documents of a text file.

    loss = mean of -log p(token | tokens before it)      perplexity = exp(loss)
    bits per byte = sum of -log2 p(token) / bytes of text, which no tokenizer changes

Documents are cut into windows as in lm-evaluation-harness. Each token is predicted once, and the
last window reaches back to fill its context.

    tokens 0 … 9, context 4     predicted      1 2 3 4     5 6 7 8           9
                                read         0 1 2 3     4 5 6 7     5 6 7 8
"""

import math
from collections.abc import Iterator
from pathlib import Path

from minillama.data.records import read_records
from minillama.data.sources import Source
from minillama.errors import UserError
from minillama.evaluation.batching import Query
from minillama.evaluation.likelihood import QueryResult
from minillama.evaluation.options import EvalOptions
from minillama.evaluation.protocols import TASKS, Setup, find_protocol
from minillama.evaluation.report import Record
from minillama.files import sha256_of
from minillama.tokenizer import Tokenizer

METRICS = ("perplexity", "loss", "bits_per_byte")


class Perplexity:
    """A benchmark of documents; its queries are their windows."""

    metric_name = "nats per token"  # the mean of `metric`, for the progress bar

    def __init__(self, options: EvalOptions, tokenizer: Tokenizer, max_length: int) -> None:
        path = Path(options.data)
        if not path.is_file():
            raise UserError(f'{path}: no such file; give a .txt, or a .jsonl with "text"')
        protocol = find_protocol(TASKS[options.task], options.protocol)
        self.setup = Setup(protocol, n_shots=0, split="whole")
        self.hashes = {path.name: sha256_of(path)}
        self.queries: dict[str, Query] = {}
        self.num_bytes = 0

        texts = list(read_texts(path))[: options.limit or None]
        for number, text in enumerate(texts):
            ids = encode_document(tokenizer, text)
            self.num_bytes += len(text.encode())
            for start in range(0, len(ids) - 1, max_length):
                self.queries[f"{number}/{start}"] = window_query(ids, start, max_length)
        if not self.queries:
            raise UserError(f"{path}: its texts are empty")

    def make_record(self, id: str, result: QueryResult) -> Record:
        """The log-likelihood of a window."""
        num_tokens = len(self.queries[id].continuations[0])
        return {"tokens": num_tokens, "scores": {"text": result.logprobs[0]}}

    def metric(self, record: Record) -> float:
        """The loss of a window."""
        return -record["scores"]["text"] / record["tokens"]

    def summarise(self, records: list[Record]) -> Record:
        num_tokens = sum(record["tokens"] for record in records)
        nats = -math.fsum(record["scores"]["text"] for record in records)
        loss = nats / num_tokens
        return {
            "n": num_tokens,
            "accuracy": None,
            "stderr": None,
            "majority": None,
            "subjects": {},
            "perplexity": math.exp(loss),
            "loss": loss,
            "bits_per_byte": nats / math.log(2) / self.num_bytes,
        }

    def format_table(self, summary: Record, reference: Record | None) -> str:
        lines = []
        for name in METRICS:
            line = f"{name:15}{summary[name]:>12.4f}"
            if reference and name in reference:
                difference = summary[name] - reference[name]
                line += f"   reference {reference[name]:.4f}, difference {difference:+.4f}"
            lines.append(line)
        return "\n".join(lines)


def read_texts(path: Path) -> Iterator[str]:
    """The documents of a file: a text as a whole, whatever its suffix, or each record's "text"."""
    for place, record in read_records(Source(path, "text")):
        text = record.get("text") if isinstance(record, dict) else record
        if not isinstance(text, str):
            raise UserError(f'{path} {place}: lacks the string "text" ({record!s:.120})')
        yield text


def encode_document(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a document, of which all but the first are predicted.

    The first is BOS. Where the tokenizer adds none it is EOS, which ended the document before; a
    tokenizer without both leaves the text's own first token unpredicted.
    """
    start = tokenizer.starts_with
    if not start and tokenizer.eos_id is not None:
        start = [tokenizer.eos_id]
    return [*start, *tokenizer.encode(text)]


def window_query(ids: list[int], start: int, max_length: int) -> Query:
    """Predicts the `max_length` tokens after ids[start]; the context ends with ids[start]."""
    end = min(start + max_length, len(ids) - 1)  # the last token that is predicted
    context_start = max(0, end - max_length)
    return Query(ids[context_start : start + 1], [ids[start + 1 : end + 1]])
