"""How well the demo model learnt: exact answers to prompts it was never trained on."""

import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from minillama.checkpoint.hf_format import write_json
from minillama.data import demo
from minillama.errors import UserError, closest
from minillama.evaluation.report import row
from minillama.evaluation.runner import load_options, write
from minillama.generation.config import GenerationConfig
from minillama.generation.engine import Engine
from minillama.generation.loading import load_engine
from minillama.model import Llama


def evaluate(options: Namespace) -> None:
    """Score the demo's kinds of question, with the same architecture untrained beside them."""
    if unknown := [name for name in options.subjects if name not in demo.KINDS]:
        raise UserError(
            f"no subject {unknown[0]!r}{closest(unknown[0], demo.KINDS)}; subjects: {', '.join(demo.KINDS)}"
        )
    began, limit = time.perf_counter(), options.limit or 300
    session = load_engine(load_options(options), GenerationConfig(greedy=True, max_new_tokens=16))
    path = session.path
    kinds = options.subjects or demo.DEMO + (
        demo.DEMO_LORA if (path / "adapter_config.json").is_file() else ()
    )
    scores, predictions = score(session, kinds, limit, options.batch_size, str(path))
    fresh = (
        Llama(session.model.config)
        .initialise(torch.Generator().manual_seed(options.seed))
        .to(session.model.lm_head.weight.device)
    )
    before, _ = score(
        replace(session, model=fresh.eval()),
        kinds,
        min(limit, 10 * len(kinds)),
        options.batch_size,
        "untrained",
    )
    print(f"{'questions about':16}{'n':>5}{'correct':>10}{'untrained':>12}")
    for kind, trained in scores.items():
        print(
            f"{kind:16}{trained['n']:>5}{trained['accuracy']:>10.1%}{before[kind]['accuracy']:>12.1%}"
        )
    if options.out:
        write(Path(options.out), predictions)
        write_json(
            Path(options.out) / "summary.json",
            {
                "task": "demo",
                "protocol": "exact match of the greedy answer",
                "n_shots": 0,
                **scores["total"],
                "untrained": before["total"]["accuracy"],
                "subjects": {kind: scores[kind] for kind in kinds},
                "seconds": round(time.perf_counter() - began, 2),
                "model": str(path),
                "data_sha256": None,
            },
        )
    print(f"next: python generate.py --ckpt {options.ckpt} --chat")


def score(
    session: Engine, kinds: tuple[str, ...], questions: int, batch_size: int, label: str
) -> tuple[dict[str, dict], list[dict]]:
    """(a `tables.row` for each kind of question and one named `total`, a prediction for each held-out prompt): exact match, greedy."""
    records = list(demo.records(kinds, questions, seed=1, held_out=True))
    asked = session.new_completions(
        [session.encode_prompt(record["instruction"]) for record in records], num_samples=1
    )
    with tqdm(total=len(records), desc=label, unit="question", leave=False) as bar:
        for number, _ in session.stream_all(asked, batch_size, seed=None):
            bar.update(bool(asked[number][0].finish_reason))
    predictions = [
        {
            "id": number,
            "subject": record["kind"],
            "question": record["instruction"],
            "gold": record["output"],
            "predicted": asked[number][0].text.strip(),
        }
        for number, record in enumerate(records)
    ]
    return {
        kind: row([p for p in predictions if kind in (p["subject"], "total")])
        for kind in (*kinds, "total")
    }, predictions
