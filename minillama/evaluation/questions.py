"""Tests: what is asked becomes queries, and readings become records. `Choices` are questions with given answers, `Perplexity` is texts.

A prompt that does not fit loses shots first, the last one first; only a question too long by itself is cut, at its beginning. Both are
counted and printed, for they change the score. Of equal scores the first choice wins.
"""

import math
import re
from argparse import Namespace
from pathlib import Path

from minillama.data.records import read_records
from minillama.data.sources import Source
from minillama.errors import UserError
from minillama.evaluation import report
from minillama.evaluation.likelihood import Query, QueryResult
from minillama.evaluation.protocols import (
    TASKS,
    Protocol,
    find_files,
    find_protocol,
    read_questions,
    read_shots,
)
from minillama.files import sha256_of
from minillama.generation.output_file import Record
from minillama.tokenizer import Tokenizer

PENALTY, TEMPERATURE = 1.1, 0.2  # of Chinese-LLaMA-Alpaca's generation


class Choices:
    """A test: questions under a protocol, and the queries they become, both by id."""

    measure, show = "accuracy", staticmethod(report.table)

    def __init__(self, options: Namespace, tokenizer: Tokenizer, max_length: int) -> None:
        self.task, self.tokenizer, self.max_length, self.questions, self.queries = (
            options.task,
            tokenizer,
            max_length,
            {},
            {},
        )
        name, self.protocol = find_protocol(options.task, options.protocol)
        n_shots = self.protocol.n_shots if options.n_shots is None else options.n_shots
        self.about = {"protocol": name, "n_shots": n_shots, "split": TASKS[options.task]["split"]}
        self.notes = {"shots_dropped": 0, "prompts_cut": 0, "example_prompt": ""}
        files = find_files(options.task, Path(options.data), options.subjects)
        self.hashes = {subject: sha256_of(file) for subject, file in files.items()}
        for subject, file in files.items():
            shots = read_shots(options.task, subject, Path(options.data), n_shots)
            for number, question in enumerate(
                read_questions(options.task, subject, file)[: options.limit or None]
            ):
                self.questions[f"{subject}/{number}"], self.queries[f"{subject}/{number}"] = (
                    question,
                    self._query(question, shots),
                )

    def _query(self, question: dict[str, str], shots: list[dict[str, str]]) -> Query:
        begin = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        for kept in range(len(shots), -1, -1):
            prompt = self.protocol.prompt(question, shots[:kept])
            query = Query(
                begin + self.tokenizer.encode(prompt),
                continuations(self.protocol, self.tokenizer, prompt),
            )
            if (excess := query.length - self.max_length) <= 0:
                break
        else:
            del query.context[len(begin) : len(begin) + excess]
            self.notes["prompts_cut"] += 1
        self.notes["shots_dropped"] += len(shots) - kept
        self.notes["example_prompt"] = self.notes["example_prompt"] or prompt
        return query

    def judge(self, id: str, reading: QueryResult) -> Record:
        """The record of an answer."""
        predicted, scores = decide(self.protocol, self.tokenizer, self.queries[id], reading)
        return {
            "subject": self.questions[id]["key"],
            "gold": self.questions[id]["answer"],
            "predicted": predicted,
            "scores": scores,
        }

    def worth(self, record: Record) -> float:
        return record["gold"] == record["predicted"]

    def summarise(self, records: list[Record]) -> Record:
        return (
            report.summarise(records, TASKS[self.task].get("groups", {}), self.hashes) | self.notes
        )


class Perplexity:
    """The same for documents: exp of the mean -log p(token | what came before), and bits per byte, which no tokenizer changes.
    Windows are lm-evaluation-harness's: each token is predicted once; the last window reaches back to fill its context."""

    measure = "nats per token"

    def __init__(self, options: Namespace, tokenizer: Tokenizer, max_length: int) -> None:
        path, first = (
            Path(options.data),
            tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id,
        )
        if not path.is_file():
            raise UserError(f'{path}: no such file; give a .txt, or a .jsonl with "text"')
        self.about = {
            "protocol": find_protocol(options.task, options.protocol)[0],
            "n_shots": 0,
            "split": "whole",
        }
        self.hashes, self.queries, self.bytes = {path.name: sha256_of(path)}, {}, 0
        for number, (place, row) in enumerate(
            list(read_records(Source(path)))[: options.limit or None]
        ):
            if not isinstance(text := row.get("text") if isinstance(row, dict) else row, str):
                raise UserError(f'{path} {place}: lacks the string "text" ({row!s:.120})')
            ids = [first, *tokenizer.encode(text)]
            self.bytes += len(text.encode())
            for start in range(0, len(ids) - 1, max_length):
                end = min(start + max_length, len(ids) - 1)
                self.queries[f"{number}/{start}"] = Query(
                    ids[max(0, end - max_length) : start + 1], [ids[start + 1 : end + 1]]
                )
        if not self.queries:
            raise UserError(f"{path}: its texts are empty")

    def judge(self, id: str, reading: QueryResult) -> Record:
        return {
            "tokens": len(self.queries[id].continuations[0]),
            "scores": {"text": reading.logprobs[0]},
        }

    def worth(self, record: Record) -> float:
        return -record["scores"]["text"] / record["tokens"]

    def summarise(self, records: list[Record]) -> Record:
        tokens, nats = (
            sum(r["tokens"] for r in records),
            -math.fsum(r["scores"]["text"] for r in records),
        )
        return {
            "n": tokens,
            "accuracy": None,
            "stderr": None,
            "majority": None,
            "subjects": {},
            "perplexity": math.exp(nats / tokens),
            "loss": nats / tokens,
            "bits_per_byte": nats / math.log(2) / self.bytes,
        }

    @staticmethod
    def show(summary: Record, reference: Record | None) -> str:
        names = ("perplexity", "loss", "bits_per_byte")
        there = {
            name: f"   reference {reference[name]:.4f}, difference {summary[name] - reference[name]:+.4f}"
            if reference
            else ""
            for name in names
        }
        return "\n".join(f"{name:15}{summary[name]:>12.4f}{there[name]}" for name in names)


def continuations(protocol: Protocol, tokenizer: Tokenizer, prompt: str) -> list[list[int]]:
    """The ids whose probability is read for each choice; "penalised": ▁A …, then the bare A …, as it stands behind a colon."""
    if protocol.rule == "likelihood":
        whole = len(tokenizer.encode(prompt))
        return [tokenizer.encode(prompt + text)[whole:] for text in protocol.choices.values()]
    texts = [
        before + text.strip()
        for before in ("", "：")[: 1 + (protocol.rule == "penalised")]
        for text in protocol.choices.values()
    ]
    return [tokenizer.encode(text)[-1:] for text in texts]


def decide(
    protocol: Protocol, tokenizer: Tokenizer, query: Query, reading: QueryResult
) -> tuple[str, dict[str, float]]:
    """(the answer taken, "" for none; a score for each choice)."""
    values, n = reading.logprobs, len(protocol.choices)
    if protocol.rule == "penalised":
        logits = [
            logit
            if token not in query.context
            else logit / PENALTY
            if logit > 0
            else logit * PENALTY
            for (token,), logit in zip(query.continuations, reading.logits, strict=True)
        ]
        values = [(logits[i] + logits[i + n]) / TEMPERATURE for i in range(n)]
    scores = dict(zip(protocol.choices, values, strict=True))
    if protocol.rule != "written":
        return max(scores, key=scores.get), scores
    text = tokenizer.decode([reading.greedy])
    found = next(filter(None, (re.match(pattern, text) for pattern in protocol.patterns)), None)
    return found[1] if found else "", scores
