"""How well the demo model learned: exact completions of prompts that it was never trained on.

The same architecture with random weights is scored beside it, so that chance can be seen.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from minillama.data import demo
from minillama.errors import UserError, closest
from minillama.evaluation.options import EvalOptions
from minillama.evaluation.predictions import publish
from minillama.evaluation.report import EvalResult, Record, score_predictions
from minillama.files import write_json
from minillama.generation.config import GenerationConfig
from minillama.generation.engine import Engine
from minillama.generation.loading import LoadOptions, load_engine
from minillama.model import Llama
from minillama.threads import use_threads_for

GREEDY = GenerationConfig(greedy=True, max_new_tokens=16)
NUM_QUESTIONS = 300  # in all, without --limit


class DemoScores(NamedTuple):
    scores: dict[str, Record]  # by kind of question, and "total"
    predictions: list[Record]


def evaluate(options: EvalOptions, model: Engine | LoadOptions) -> EvalResult:
    """Score the demo's kinds of question, with the untrained model beside them."""
    start = time.perf_counter()
    for kind in options.subjects:
        if kind not in demo.KINDS:
            hint = closest(kind, demo.KINDS)
            raise UserError(f"no subject {kind!r}{hint}; subjects: {', '.join(demo.KINDS)}")
    if isinstance(model, LoadOptions):
        engine = load_engine(model, GREEDY)
        use_threads_for(engine.model.config.parameter_count())
    else:
        engine = replace(model, config=replace(GREEDY, template=model.template))
    kinds = options.subjects or kinds_of(engine)
    num_questions = options.limit or NUM_QUESTIONS
    num_untrained = min(num_questions, 10 * len(kinds))
    batch_size = options.batch_size
    trained = score(engine, kinds, num_questions, batch_size, str(engine.path))
    untrained = score(
        without_training(engine, options.seed), kinds, num_untrained, batch_size, "untrained"
    )
    summary = {
        "task": "demo",
        "protocol": "exact match of the greedy answer",
        "n_shots": 0,
        **trained.scores["total"],
        "untrained": untrained.scores["total"]["accuracy"],
        "subjects": {kind: trained.scores[kind] for kind in kinds},
        "seconds": round(time.perf_counter() - start, 2),
        "model": str(engine.path),
        "data_sha256": None,
    }
    if options.out:
        out = Path(options.out)
        publish(out, trained.predictions)
        write_json(out / "summary.json", summary)
    table = format_table(trained.scores, untrained.scores)
    return EvalResult(summary, table, trained.predictions)


def kinds_of(engine: Engine) -> tuple[str, ...]:
    """The kinds of question that a demo model was trained on; an adapter adds some."""
    is_adapter = engine.path is not None and (engine.path / "adapter_config.json").is_file()
    return demo.DEMO + demo.DEMO_LORA if is_adapter else demo.DEMO


def without_training(engine: Engine, seed: int) -> Engine:
    """The same engine with random weights."""
    generator = torch.Generator().manual_seed(seed)
    model = Llama(engine.model.config).initialise(generator)
    device = engine.model.lm_head.weight.device
    return replace(engine, model=model.to(device).eval())


def score(
    engine: Engine, kinds: tuple[str, ...], num_questions: int, batch_size: int, label: str
) -> DemoScores:
    """Complete held-out prompts greedily; a completion is correct if it is exactly the answer."""
    questions = demo.records(kinds, num_questions, seed=1, held_out=True)
    prompts = [engine.encode_prompt(question["instruction"]) for question in questions]
    requests = engine.new_completions(prompts, num_samples=1)
    with tqdm(total=len(questions), desc=label, unit="question", leave=False) as bar:
        for number, _ in engine.stream_all(requests, batch_size, seed=None):
            if requests[number][0].is_finished:
                bar.update()
    predictions = []
    for number, question in enumerate(questions):
        prediction = {
            "id": number,
            "subject": question["kind"],
            "question": question["instruction"],
            "gold": question["output"],
            "predicted": requests[number][0].text.strip(),
        }
        predictions.append(prediction)
    scores = {}
    for kind in kinds:
        scores[kind] = score_predictions([p for p in predictions if p["subject"] == kind])
    scores["total"] = score_predictions(predictions)
    return DemoScores(scores, predictions)


def format_table(trained: dict[str, Record], untrained: dict[str, Record]) -> str:
    lines = [f"{'questions about':16}{'n':>5}{'correct':>10}{'untrained':>12}"]
    for kind, score in trained.items():
        baseline = untrained[kind]["accuracy"]
        lines.append(f"{kind:16}{score['n']:>5}{score['accuracy']:>10.1%}{baseline:>12.1%}")
    return "\n".join(lines)
