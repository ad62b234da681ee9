"""The losses of two training runs, side by side: do they learn alike?

With a the run's and b the reference's loss at a step: the mean of (a - b) / b, signed, so that noise cancels and drift does not (passes up
to 2 %), the largest |a - b| / b, and the mean of |a - b| (passes up to 0.005). A loss that is not finite (an update skipped by the fp16
scale) must be so in both runs.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from minillama.checkpoint.hf_format import write_json
from minillama.errors import UserError, parsing
from minillama.loss_curves import draw_losses, read_metrics

LIMITS = {"mean_relative": 0.02, "mean_absolute": 0.005}


def evaluate(options: Namespace) -> None:
    """`eval.py --task loss`: --data is the run, --compare the reference; --out DIR gets summary.json, and a plot with the extra.
    Exit code 1 where a limit is passed."""
    losses = [read_losses(Path(name)) for name in (options.data, options.compare)]
    result = {"task": "loss", "run": options.data, "reference": options.compare, **compare(*losses)}
    print(f"{result['n']} steps in both runs, {result['only_in_one']} in only one of them")
    for name in ("mean_relative", "max_relative", "mean_absolute"):
        verdict = (
            f"   {'pass' if result['passed'][name] else 'FAIL'} (limit {LIMITS[name]})"
            if name in LIMITS
            else ""
        )
        print(f"{name:16}{result[name]:>+12.6f}{verdict}")
    if options.out:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "summary.json", result)
        curves = {
            name: [(step, loss) for step, loss in some.items() if loss is not None]
            for name, some in zip((options.data, options.compare), losses, strict=True)
        }
        print(
            f"plot: {draw_losses(out / 'loss.png', curves) or 'not drawn; pip install minillama[plot]'}"
        )
    if not all(result["passed"].values()):
        raise SystemExit(1)


def compare(run: dict[int, float | None], reference: dict[int, float | None]) -> dict[str, Any]:
    """The three errors, whether they `passed`, and the number of steps they were taken over. Losses by step, None: not finite."""
    common = sorted(run.keys() & reference.keys())
    if odd := [step for step in common if (run[step] is None) != (reference[step] is None)]:
        raise UserError(
            f"step {odd[0]}: its loss is finite in only one of the runs; they skipped different updates"
        )
    pairs = [(run[step], reference[step]) for step in common if run[step] is not None]
    if zero := [step for step in common if reference[step] == 0]:
        raise UserError(
            f"step {zero[0]}: the reference's loss is 0, so an error relative to it has no meaning"
        )
    if not pairs:
        raise UserError("the runs have no step with a loss in common")
    relative = [(a - b) / b for a, b in pairs]
    errors = {
        "mean_relative": sum(relative) / len(pairs),
        "max_relative": max(map(abs, relative)),
        "mean_absolute": sum(abs(a - b) for a, b in pairs) / len(pairs),
    }
    return {
        "n": len(pairs),
        "only_in_one": len(run.keys() ^ reference.keys()),
        **errors,
        "passed": {name: abs(errors[name]) <= limit for name, limit in LIMITS.items()},
    }


def read_losses(path: Path) -> dict[int, float | None]:
    """Step -> loss of a metrics.jsonl."""
    records = read_metrics(path)
    with parsing(path):
        return {
            record["step"]: None if record["loss"] is None else float(record["loss"])
            for record in records
            if "loss" in record
        }
