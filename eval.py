"""Score a LLaMA on held-out questions."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from minillama import config, errors

EXAMPLES = """
  python eval.py --task demo --ckpt runs/demo          the demo model on prompts it was never trained on
  python eval.py --list_tasks"""

TASKS = {"demo": "embedded questions of the kinds `python train.py` learns; needs no data"}


def parse(arguments: list[str]):
    parser = config.Parser(prog="eval.py", description=__doc__ + "\n" + EXAMPLES, usage="python eval.py --task NAME --ckpt DIR [options]")
    parser.add_model_flags()
    add = parser.add_argument
    add("--task", default="", metavar="NAME", help=f"what to score on: {', '.join(TASKS)}")
    add("--list_tasks", action="store_true", help="print the tasks and the files each one reads")
    add("--subjects", type=config.parse_list, default=(), metavar="A,B", help="only these subjects")
    add("--limit", type=int, default=300, metavar="N", help="questions [300]")
    add("--out", default="", metavar="DIR", help="write summary.json and predictions.jsonl there")
    add("--seed", type=int, default=0, metavar="N", help="seed of the untrained model that is printed beside [0]")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if options.list_tasks:
        print("\n".join(f"{name:12}{text}" for name, text in TASKS.items()))
        return
    if options.task not in TASKS:
        asked = f"no task {options.task!r}{errors.closest(options.task, TASKS)}" if options.task else "--task NAME is missing"
        raise errors.UserError(f"{asked}; tasks: {', '.join(TASKS)}")
    if not options.ckpt:
        raise errors.UserError(f"--ckpt DIR is missing; type: python train.py && python eval.py --task {options.task} --ckpt runs/demo")
    evaluate_demo(options)


def evaluate_demo(options) -> None:
    """Score the demo's kinds of question, with the same architecture untrained beside them."""
    import torch

    from minillama.data import demo
    from minillama.evaluation.demo import score
    from minillama.generation.loading import load_session
    from minillama.generation.sampling import Sampling
    from minillama.model import Llama

    unknown = [name for name in options.subjects if name not in demo.KINDS]
    if unknown:
        raise errors.UserError(f"no subject {unknown[0]!r}{errors.closest(unknown[0], demo.KINDS)}; subjects: {', '.join(demo.KINDS)}")
    began = time.perf_counter()
    session, path = load_session(options, Sampling(temperature=0.0), max_new_tokens=16)
    kinds = options.subjects or demo.DEMO + (demo.DEMO_LORA if (path / "adapter_config.json").is_file() else ())
    scores, predictions = score(session, kinds, options.limit, str(path))
    fresh = Llama(session.model.config).initialise(torch.Generator().manual_seed(options.seed)).to(session.model.lm_head.weight.device)
    before, _ = score(replace(session, model=fresh.eval()), kinds, min(options.limit, 10 * len(kinds)), "untrained")
    print(f"{'questions about':16}{'n':>5}{'correct':>10}{'untrained':>12}")
    for kind, trained in scores.items():
        print(f"{kind:16}{trained.questions:>5}{trained.accuracy:>10.1%}{before[kind].accuracy:>12.1%}")
    if options.out:
        n, accuracy = scores["total"].questions, scores["total"].accuracy
        summary = {"task": "demo", "protocol": "exact match of the greedy answer", "n_shots": 0, "n": n, "accuracy": accuracy,
                   "stderr": (accuracy * (1 - accuracy) / n) ** 0.5, "untrained": before["total"].accuracy,
                   "subjects": {kind: {"n": scores[kind].questions, "accuracy": scores[kind].accuracy} for kind in kinds},
                   "seconds": round(time.perf_counter() - began, 2), "model": str(path), "data_sha256": None}
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        (out / "predictions.jsonl").write_text("".join(json.dumps(p) + "\n" for p in predictions), encoding="utf-8")
    print(f"next: python generate.py --ckpt {options.ckpt} --chat")


if __name__ == "__main__":
    errors.run(main, sys.argv[1:])
