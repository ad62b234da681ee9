"""Multiple choice: questions under a protocol become queries, and their results become records.

A prompt that does not fit loses its solved examples (shots), the last one first. Only a question
that is too long without any is cut, at its beginning. Both change the score, so both are counted
and printed. Of equal scores the first choice wins.
"""

import re
from pathlib import Path
from typing import NamedTuple

from minillama.evaluation import report
from minillama.evaluation.batching import Query
from minillama.evaluation.likelihood import QueryResult
from minillama.evaluation.options import EvalOptions
from minillama.evaluation.protocols import TASKS, Protocol, Question, Setup, find_protocol
from minillama.evaluation.questions import find_files, find_root, read_questions, read_shots
from minillama.evaluation.report import Record
from minillama.evaluation.wrapping import Wrapping
from minillama.files import sha256_of
from minillama.tokenizer import Tokenizer

PENALTY = 1.1  # repetition penalty and temperature of Chinese-LLaMA-Alpaca's generation
TEMPERATURE = 0.2


class MultipleChoice:
    """A benchmark of questions with choices: the questions and their queries, both by id."""

    metric_name = "accuracy"  # the mean of `metric`, for the progress bar

    def __init__(self, options: EvalOptions, tokenizer: Tokenizer, max_length: int) -> None:
        self.task = TASKS[options.task]
        name = find_protocol(self.task, options.protocol)
        self.protocol = self.task.protocols[name]
        n_shots = self.protocol.n_shots if options.n_shots is None else options.n_shots
        self.setup = Setup(name, n_shots, self.task.split)
        self.tokenizer = tokenizer
        self.wrapping: Wrapping | None = None
        if options.template not in ("", "none"):
            self.wrapping = Wrapping(options.template, self.protocol, tokenizer)
        self.max_length = max_length
        self.shots_dropped = 0
        self.prompts_cut = 0
        self.example_prompt = ""  # the first one
        self.questions: dict[str, Question] = {}
        self.queries: dict[str, Query] = {}

        data = find_root(self.task, Path(options.data))
        files = find_files(self.task, data, options.subjects)
        self.hashes = {subject: sha256_of(file) for subject, file in files.items()}
        for subject, file in files.items():
            shots = read_shots(self.task, subject, data, n_shots)
            questions = read_questions(self.task, subject, file)
            for number, question in enumerate(questions[: options.limit or None]):
                id = f"{subject}/{number}"
                self.questions[id] = question
                self.queries[id] = self._make_query(question, shots)

    def _make_query(self, question: Question, shots: list[Question]) -> Query:
        """The query of a question, behind as many shots as fit."""
        for num_shots in range(len(shots), -1, -1):
            prompt = self.protocol.prompt(question, shots[:num_shots])
            query = self._encode(prompt)
            excess = query.length - self.max_length
            if excess <= 0:
                break
        if excess > 0:
            query = self._cut(query, excess)
        self.shots_dropped += len(shots) - num_shots
        self.example_prompt = self.example_prompt or prompt
        return query

    def _encode(self, prompt: str) -> Query:
        if self.wrapping is not None and self.protocol.rule == "likelihood":
            return self.wrapping.query(prompt, list(self.protocol.choices.values()))
        continuations = encode_choices(self.protocol, self.tokenizer, prompt)
        if self.wrapping is not None:
            return Query(self.wrapping.context(prompt), continuations)
        return Query(self.tokenizer.starts_with + self.tokenizer.encode(prompt), continuations)

    def _cut(self, query: Query, excess: int) -> Query:
        """The query without the first `excess` tokens after BOS."""
        num_kept = len(self.tokenizer.starts_with)
        if query.context[:num_kept] != self.tokenizer.starts_with:
            num_kept = 0  # a template without BOS
        self.prompts_cut += 1
        context = query.context[:num_kept] + query.context[num_kept + excess :]
        return Query(context, query.continuations)

    def make_record(self, id: str, result: QueryResult) -> Record:
        """The prediction of a question."""
        question = self.questions[id]
        decision = decide(self.protocol, self.tokenizer, self.queries[id], result)
        return {
            "subject": question["key"],
            "gold": question["answer"],
            "predicted": decision.predicted,
            "scores": decision.scores,
        }

    def metric(self, record: Record) -> float:
        """1 for a correct prediction, else 0; the mean is the accuracy."""
        return float(record["gold"] == record["predicted"])

    def summarise(self, records: list[Record]) -> Record:
        return {
            **report.summarise(records, self.task.groups, self.hashes),
            "shots_dropped": self.shots_dropped,
            "prompts_cut": self.prompts_cut,
            "example_prompt": self.example_prompt,
        }

    def format_table(self, summary: Record, reference: Record | None) -> str:
        return report.format_table(summary, reference)


def encode_choices(protocol: Protocol, tokenizer: Tokenizer, prompt: str) -> list[list[int]]:
    """The token ids of each choice, as its protocol's rule scores them.

    "likelihood": the tokens that a choice adds to the prompt. Other rules: the last token of the
    choice by itself. "penalised": of all choices, then of all as they are behind a colon.
    """
    texts = list(protocol.choices.values())
    if protocol.rule == "likelihood":
        prompt_length = len(tokenizer.encode(prompt))
        return [tokenizer.encode(prompt + text)[prompt_length:] for text in texts]
    texts = [text.strip() for text in texts]
    if protocol.rule == "penalised":
        texts += [f"：{text}" for text in texts]  # ▁A, then A without a space before it
    return [tokenizer.encode(text)[-1:] for text in texts]


class Decision(NamedTuple):
    """What a rule takes for the model's answer."""

    predicted: str  # "": none of the choices
    scores: dict[str, float]  # of each choice


def decide(protocol: Protocol, tokenizer: Tokenizer, query: Query, result: QueryResult) -> Decision:
    """Apply the protocol's rule to the result of a query."""
    values = result.logprobs
    if protocol.rule == "penalised":
        values = penalised_scores(query, result)
    scores = dict(zip(protocol.choices, values, strict=True))
    if protocol.rule == "written":
        written = tokenizer.decode([result.greedy])
        return Decision(find_answer(protocol, written), scores)
    return Decision(max(scores, key=lambda choice: scores[choice]), scores)


def penalised_scores(query: Query, result: QueryResult) -> list[float]:
    """The scores of Chinese-LLaMA-Alpaca: transformers' repetition penalty, then temperature.

    A choice has two tokens, i and i + n of the query's 2 n continuations. Their logits are added.
    """
    logits = []
    for continuation, logit in zip(query.continuations, result.logits, strict=True):
        if continuation[0] in query.context:
            logit = logit / PENALTY if logit > 0 else logit * PENALTY
        logits.append(logit)
    n = len(logits) // 2
    return [(logits[i] + logits[i + n]) / TEMPERATURE for i in range(n)]


def find_answer(protocol: Protocol, written: str) -> str:
    """The answer in a written text: group 1 of the first pattern that fits its beginning; or ""."""
    for pattern in protocol.patterns:
        match = re.match(pattern, written)
        if match:
            return match[1]
    return ""
