"""The embedded data: instructions that a small model can learn in two minutes.

The questions are about short lists of words and pairs of numbers, and the answer follows from the
question alone. So a model that answers a prompt it has never seen has learnt the task, and not the
list of prompts. A hash of the prompt decides whether it is held out. So no prompt is on both sides,
whatever the seed or the number of records.
"""

import hashlib
import json
import random
from pathlib import Path

from minillama.files import write_bytes
from minillama.tokenizer import train_tokenizer

WORDS = (
    "apple bird boat book bread bridge cat chair cloud coat corn cup desk dog door drum duck egg "
    "farm fish flag flower fork fox frog garden goat gold grass hat horse house key king lamp leaf "
    "lemon milk moon nest owl paper pear river road ship shoe snow star tree"
).split()

DEMO = ("first", "second", "last", "repeat", "count", "larger")  # questions of the preset `demo`
DEMO_LORA = ("third",)  # what the preset `demo_lora` adds
KINDS = DEMO + DEMO_LORA

MOST_WORDS = {"repeat": (2, 4), "count": (2, 6)}  # fewest and most words of a list; else 3 to 5
NUMBER_NAMES = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
POSITIONS = {"first": 0, "second": 1, "third": 2, "last": -1}

# For each preset, the kinds of question in turn, and how many. Half of demo_lora's are old ones.
PRESETS = {
    "demo": (DEMO, 56_000),
    "demo_lora": (DEMO_LORA * len(DEMO) + DEMO, 16_000),
}
# The kinds of question that a trained preset suggests to ask.
SUGGESTED = {"demo": ("larger", "repeat", "last"), "demo_lora": ("third", "larger", "last")}
VOCABULARY_SIZE = 640
VOCABULARY_RECORDS = 5000  # records that the vocabulary is learnt from
MOSTLY_ONE_ROUND = (1,) * 14 + (2, 3)


def question(kind: str, rng: random.Random) -> tuple[str, str]:
    """A random question of one of KINDS, and its answer."""
    if kind == "larger":
        a, b = rng.sample(range(10, 100), 2)
        return f"Which number is larger, {a} or {b}?", str(max(a, b))
    fewest, most = MOST_WORDS.get(kind, (3, 5))
    words = rng.sample(WORDS, rng.randint(fewest, most))
    listed = ", ".join(words)
    if kind == "repeat":
        return f"Please repeat {listed}.", listed
    if kind == "count":
        return f"How many words are in {listed}?", NUMBER_NAMES[len(words)]
    return f"What is the {kind} word in {listed}?", words[POSITIONS[kind]]


def is_held_out(prompt: str) -> bool:
    """About one prompt in sixteen, decided by its sha256 alone."""
    return hashlib.sha256(prompt.encode()).digest()[0] < 16


def records(kinds: tuple[str, ...], count: int, seed: int, held_out: bool) -> list[dict[str, str]]:
    """`count` Alpaca records, all held out or none, of the kinds in turn.

    Each has its `kind` as a field. Held-out prompts are distinct.
    """
    rng = random.Random(seed)
    chosen: list[dict[str, str]] = []
    prompts: set[str] = set()
    while len(chosen) < count:
        kind = kinds[len(chosen) % len(kinds)]
        prompt, answer = question(kind, rng)
        is_repeated = held_out and prompt in prompts
        if is_held_out(prompt) == held_out and not is_repeated:
            prompts.add(prompt)
            chosen.append({"instruction": prompt, "input": "", "output": answer, "kind": kind})
    return chosen


def suggested_questions(name: str) -> list[str]:
    """Three held-out questions that a model trained on a preset's data should answer."""
    suggested = records(SUGGESTED[name], 3, seed=1, held_out=True)
    return [record["instruction"] for record in suggested]


def conversations(questions: list[dict[str, str]], seed: int) -> list[dict]:
    """The questions as Alpaca records of one to three rounds, mostly one.

    With several rounds the model also learns to continue after an answer.
    """
    rng = random.Random(seed)
    remaining = rng.sample(questions, len(questions))
    made = []
    while remaining:
        num_rounds = min(rng.choice(MOSTLY_ONE_ROUND), len(remaining))
        *earlier, last = [remaining.pop() for _ in range(num_rounds)]
        conversation: dict = {name: last[name] for name in ("instruction", "input", "output")}
        conversation["history"] = [[round["instruction"], round["output"]] for round in earlier]
        made.append(conversation)
    return made


def write_demo(name: str, directory: Path) -> tuple[Path, Path]:
    """Write the training data of the preset `demo` or `demo_lora`, and demo's vocabulary.

    Returns the two paths.
    """
    kinds, count = PRESETS[name]
    questions = records(kinds, count, seed=0, held_out=False)
    texts = []
    for record in questions[:VOCABULARY_RECORDS]:
        texts.append(f"Human: {record['instruction']}\nAssistant: {record['output']}")
    data_path = directory / f"{name}.json"
    data = json.dumps(conversations(questions, seed=0), indent=0)
    _write_if_changed(data_path, data.encode())
    vocabulary_path = directory / "tokenizer.model"
    _write_if_changed(vocabulary_path, train_tokenizer(texts, VOCABULARY_SIZE))
    return data_path, vocabulary_path


def _write_if_changed(path: Path, content: bytes) -> None:
    """Write a file. An unchanged one keeps its time, and so its place in the token cache."""
    if not path.is_file() or path.read_bytes() != content:
        write_bytes(path, content)
