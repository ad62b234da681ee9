"""Questions with given answers (BoolQ, MMLU, C-Eval, CMMLU): from files to queries, and from readings to a table.

A prompt that does not fit is shortened where it hurts least: shots go first, the last one first; only a question that does not fit by
itself is cut at its beginning. Both are counted and printed, for they change the score.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from minillama.evaluation import tables
from minillama.evaluation.protocols import continuations, decide, find_protocol
from minillama.evaluation.questions import TASKS, Question, read_shots, read_subjects, sha256
from minillama.evaluation.scoring import Query, Reading
from minillama.tokenizer import Tokenizer

Record = dict[str, Any]


class Choices:
    """A test of questions under a protocol. `queries` are what the model is asked, by the questions' ids."""

    measure = "accuracy"

    def __init__(self, options: Namespace, tokenizer: Tokenizer, max_length: int) -> None:
        self.task, self.tokenizer, self.max_length = options.task, tokenizer, max_length
        name, self.protocol = find_protocol(options.task, options.protocol)
        n_shots = self.protocol.n_shots if options.n_shots is None else options.n_shots
        self.about = {"protocol": name, "n_shots": n_shots, "split": TASKS[options.task].split}
        self.shots_dropped, self.prompts_cut, self.example = 0, 0, ""
        self.queries: dict[str, Query] = {}
        self.questions: dict[str, Question] = {}
        subjects, files = read_subjects(options.task, Path(options.data), options.subjects, options.limit or 0)
        self.hashes = {subject: sha256(file) for subject, file in files.items()}
        for subject, questions in subjects.items():
            shots = read_shots(options.task, subject, Path(options.data), n_shots)
            self.questions |= {question.id: question for question in questions}
            self.queries |= {question.id: self._query(question, shots) for question in questions}

    def _query(self, question: Question, shots: list[dict[str, str]]) -> Query:
        begin = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        for kept in range(len(shots), -1, -1):
            prompt = self.protocol.prompt(question.fields, shots[:kept])
            query = Query(begin + self.tokenizer.encode(prompt), continuations(self.protocol, self.tokenizer, prompt))
            if query.length <= self.max_length:
                break
        self.example = self.example or prompt
        self.shots_dropped += len(shots) - kept
        if (excess := query.length - self.max_length) > 0:
            self.prompts_cut += 1
            del query.context[len(begin):len(begin) + excess]
        return query

    def judge(self, id: str, reading: Reading) -> Record:
        question = self.questions[id]
        predicted, scores = decide(self.protocol, self.tokenizer, self.queries[id], reading)
        return {"subject": question.subject, "gold": question.gold, "predicted": predicted, "scores": scores}

    def worth(self, record: Record) -> float:
        return record["gold"] == record["predicted"]

    def summarise(self, records: list[Record]) -> Record:
        summary = tables.summarise(self.task, records)
        for subject, row in summary["subjects"].items():
            row["sha256"] = self.hashes[subject]
        return summary | {"shots_dropped": self.shots_dropped, "prompts_cut": self.prompts_cut, "example_prompt": self.example}

    def table(self, summary: Record, reference: Record | None) -> str:
        notes = [f"{summary['ties']} questions had two best answers; the first was taken"] if summary["ties"] else []
        if summary["shots_dropped"] or summary["prompts_cut"]:
            notes.append(f"to fit {self.max_length} tokens, {self.shots_dropped} shots were dropped and {self.prompts_cut} prompts cut "
                         "at their beginning")
        return "\n".join([tables.table(summary, reference), *notes, *filter(None, [tables.doubt(summary)])])
