"""How well the demo model learnt: exact answers to prompts it was never trained on."""

from dataclasses import dataclass

from tqdm import tqdm

from minillama.data import demo
from minillama.generation.session import Session


@dataclass(frozen=True)
class Score:
    kind: str
    questions: int
    correct: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.questions


def score(session: Session, kinds: tuple[str, ...], questions: int, label: str) -> tuple[list[Score], list[dict]]:
    """(a score for each kind of question, a prediction for each held-out prompt), by exact match of the greedy answer."""
    predictions = []
    for number, record in enumerate(tqdm(demo.records(kinds, questions, seed=1, held_out=True), desc=label, unit="question", leave=False)):
        predicted = session.answer(record["instruction"]).text.strip()
        predictions.append({"id": number, "subject": record["kind"], "question": record["instruction"], "gold": record["output"],
                            "predicted": predicted})
    scores = []
    for kind in kinds:
        own = [p for p in predictions if p["subject"] == kind]
        scores.append(Score(kind, len(own), sum(p["gold"] == p["predicted"] for p in own)))
    return scores, predictions
