"""The embedded data: instructions a small model can learn in two minutes, made by the package itself.

Questions about short lists of words and pairs of numbers, whose answers follow from the question alone: a model that answers
a prompt it has never seen has learnt the task, not the list. A prompt belongs to the held-out side by its own hash, so no
prompt can be on both sides, whatever the seed or the number of records.
"""

import hashlib
import json
import random
from pathlib import Path

from minillama.tokenizer import train_tokenizer

WORDS = (
    "apple bird boat book bread bridge cat chair cloud coat corn cup desk dog door drum duck egg farm fish flag flower fork fox frog "
    "garden goat gold grass hat horse house key king lamp leaf lemon milk moon nest owl paper pear river road ship shoe snow star tree"
).split()


DEMO = (
    "first",
    "second",
    "last",
    "repeat",
    "count",
    "larger",
)  # kinds of question: what the preset `demo` learns
DEMO_LORA = ("third",)  # what the preset `demo_lora` adds
KINDS = DEMO + DEMO_LORA


def question(kind: str, rng: random.Random) -> tuple[str, str]:
    """A question of one of KINDS and its answer, drawn."""
    if kind == "larger":
        a, b = rng.sample(range(10, 100), 2)
        return f"Which number is larger, {a} or {b}?", str(max(a, b))
    fewest, most = {"repeat": (2, 4), "count": (2, 6)}.get(kind, (3, 5))
    words = rng.sample(WORDS, rng.randint(fewest, most))
    listed = ", ".join(words)
    if kind == "repeat":
        return f"Please repeat {listed}.", listed
    if kind == "count":
        return f"How many words are in {listed}?", ("two", "three", "four", "five", "six")[
            len(words) - 2
        ]
    return f"What is the {kind} word in {listed}?", words[
        {"first": 0, "second": 1, "third": 2, "last": -1}[kind]
    ]


def is_held_out(prompt: str) -> bool:
    """About one prompt in sixteen, decided by its sha256 alone."""
    return hashlib.sha256(prompt.encode()).digest()[0] < 16


def records(kinds: tuple[str, ...], count: int, seed: int, held_out: bool) -> list[dict[str, str]]:
    """`count` alpaca records, each with its `kind`, in turn, all on the asked-for side; held-out prompts are distinct."""
    rng = random.Random(seed)
    made: list[dict[str, str]] = []
    seen: set[str] = set()
    while len(made) < count:
        kind = kinds[len(made) % len(kinds)]
        prompt, answer = question(kind, rng)
        if is_held_out(prompt) == held_out and not (held_out and prompt in seen):
            seen.add(prompt)
            made.append({"instruction": prompt, "input": "", "output": answer, "kind": kind})
    return made


def conversations(questions: list[dict[str, str]], seed: int) -> list[dict]:
    """The same questions as alpaca records of one to three rounds, mostly one, so that the model also learns to go on after an answer."""
    rng = random.Random(seed)
    shuffled, made = rng.sample(questions, len(questions)), []
    while shuffled:
        rounds = [shuffled.pop() for _ in range(min(rng.choice((1,) * 14 + (2, 3)), len(shuffled)))]
        history = [[question["instruction"], question["output"]] for question in rounds[:-1]]
        made.append(
            {name: rounds[-1][name] for name in ("instruction", "input", "output")}
            | {"history": history}
        )
    return made


def write_demo(name: str, directory: Path) -> tuple[Path, Path]:
    """Write the training data of the preset `demo` or `demo_lora`, and demo's vocabulary; returns the two files."""
    kinds, count = {"demo": (DEMO, 56_000), "demo_lora": (DEMO_LORA * len(DEMO) + DEMO, 16_000)}[
        name
    ]  # half new, half old
    directory.mkdir(parents=True, exist_ok=True)
    data, vocabulary = directory / f"{name}.json", directory / "tokenizer.model"
    made = records(kinds, count, seed=0, held_out=False)
    texts = [
        f"Human: {record['instruction']}\nAssistant: {record['output']}" for record in made[:5000]
    ]
    for path, content in (
        (data, json.dumps(conversations(made, seed=0), indent=0).encode()),
        (vocabulary, train_tokenizer(texts, 640)),
    ):
        if (
            not path.is_file() or path.read_bytes() != content
        ):  # unchanged files keep their time, and so their cache
            path.write_bytes(content)
    return data, vocabulary
