"""The losses of two training runs, side by side: do they learn alike?

Over the steps both have recorded, with a the run's and b the reference's loss:

    mean relative error   mean (a - b) / b, signed, so that noise cancels and drift does not      passes up to 2 %
    max relative error    max |a - b| / b
    mean absolute error   mean |a - b|                                                            passes up to 0.005

A step whose loss is not finite (skipped by the fp16 loss scale) is left out where both runs skipped it; where only one did, the
runs are not the same and that is an error.
"""

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from minillama.errors import UserError, parsing
from minillama.report import read_metrics

RELATIVE_LIMIT, ABSOLUTE_LIMIT = 0.02, 0.005


def evaluate(options: Namespace) -> None:
    """`eval.py --task loss`: --data is the run, --compare the reference; --out DIR gets summary.json, and a plot with the extra."""
    run, reference = Path(options.data), Path(options.compare)
    result = compare(run, reference)
    verdict = {True: "pass", False: "FAIL"}
    print(f"{result['n']} steps in both runs, {result['only_in_one']} in only one of them")
    print(f"mean relative error {result['mean_relative']:>+12.4%}   {verdict[result['passed']['relative']]} (limit {RELATIVE_LIMIT:.0%})")
    print(f"max relative error  {result['max_relative']:>12.4%}")
    print(f"mean absolute error {result['mean_absolute']:>12.5f}   {verdict[result['passed']['absolute']]} (limit {ABSOLUTE_LIMIT})")
    if options.out:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "summary.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(plot(run, reference, out / "loss.png"))


def compare(run: Path, reference: Path) -> dict[str, Any]:
    """The errors named above, whether they `passed`, and the steps they were taken over."""
    a, b = _losses(run), _losses(reference)
    common = sorted(a.keys() & b.keys())
    if odd := [step for step in common if (a[step] is None) != (b[step] is None)]:
        raise UserError(f"step {odd[0]}: its loss is finite in only one of {run} and {reference}; the runs skipped different updates")
    pairs = [(a[step], b[step]) for step in common if a[step] is not None]
    if not pairs:
        raise UserError(f"{run} and {reference}: no step has a loss in both")
    relative = [(x - y) / y for x, y in pairs]
    mean, absolute = sum(relative) / len(pairs), sum(abs(x - y) for x, y in pairs) / len(pairs)
    return {"task": "loss", "run": str(run), "reference": str(reference), "n": len(pairs), "only_in_one": len(a.keys() ^ b.keys()),
            "mean_relative": mean, "max_relative": max(map(abs, relative)), "mean_absolute": absolute,
            "passed": {"relative": abs(mean) <= RELATIVE_LIMIT, "absolute": absolute <= ABSOLUTE_LIMIT}}


def _losses(path: Path) -> dict[int, float | None]:
    with parsing(path):
        return {record["step"]: record["loss"] for record in read_metrics(path) if "loss" in record}


def plot(run: Path, reference: Path, file: Path) -> str:
    """Draw both curves and their relative error; returns where, or why not."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    try:
        from matplotlib import pyplot
    except ImportError:
        return "no plot: it needs matplotlib; pip install 'minillama[plot]'"
    a, b = ({step: loss for step, loss in _losses(path).items() if loss is not None} for path in (run, reference))
    common = sorted(a.keys() & b.keys())
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 6))
    above.plot(list(a), list(a.values()), label=str(run))
    above.plot(list(b), list(b.values()), label=str(reference), linestyle="--")
    above.set(ylabel="loss")
    above.legend(frameon=False)
    below.plot(common, [(a[step] - b[step]) / b[step] for step in common])
    below.set(xlabel="step", ylabel="relative error")
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
    return f"plot: {file}"
