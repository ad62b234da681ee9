"""How well the demo model learnt: exact answers to prompts it was never trained on."""

from dataclasses import dataclass

from tqdm import tqdm

from minillama.data import demo
from minillama.generation.session import Session


@dataclass(frozen=True)
class Score:
    questions: int
    correct: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.questions


def score(session: Session, kinds: tuple[str, ...], questions: int, label: str) -> tuple[dict[str, Score], list[dict]]:
    """(a score for each kind of question and one named `total`, a prediction for each held-out prompt): exact match, greedy."""
    predictions = []
    for number, record in enumerate(tqdm(demo.records(kinds, questions, seed=1, held_out=True), desc=label, unit="question", leave=False)):
        predictions.append({"id": number, "subject": record["kind"], "question": record["instruction"], "gold": record["output"],
                            "predicted": session.answer(record["instruction"]).text.strip()})
    right = {kind: [p["gold"] == p["predicted"] for p in predictions if kind in (p["subject"], "total")] for kind in (*kinds, "total")}
    return {kind: Score(len(answers), sum(answers)) for kind, answers in right.items()}, predictions
