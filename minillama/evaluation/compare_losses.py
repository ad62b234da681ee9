"""Compare the losses of two training runs: do they learn alike?

With a the run's and b the reference's loss at a step:

    mean_relative    mean of (a - b) / b       passes up to 2 %
    max_relative     largest |a - b| / b
    mean_absolute    mean of |a - b|           passes up to 0.005

The first one is signed, so that noise cancels and drift does not. A loss that is not finite (an
update skipped by the fp16 loss scale) must be so in both runs.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from minillama.errors import UserError
from minillama.evaluation.options import EvalOptions
from minillama.evaluation.report import EvalResult
from minillama.files import parsing, write_csv, write_json
from minillama.loss_curves import LOSS_LABEL, Curve, draw_curves, read_metrics

LIMITS = {"mean_relative": 0.02, "mean_absolute": 0.005}

Losses = dict[int, float | None]  # step -> loss; None: not finite


@dataclass(frozen=True)
class LossErrors:
    """How far the losses of a run are from those of its reference."""

    n: int  # steps that are compared
    only_in_one: int  # steps that only one of the runs has
    mean_relative: float
    max_relative: float
    mean_absolute: float

    @property
    def passed(self) -> dict[str, bool]:
        """Whether each limit is kept."""
        errors = asdict(self)
        return {name: abs(errors[name]) <= limit for name, limit in LIMITS.items()}


class StepErrors(NamedTuple):
    """How far the loss a of a step is from the reference's loss b."""

    step: int
    loss: float  # a
    reference: float  # b
    relative: float  # (a - b) / b
    absolute: float  # |a - b|


def evaluate(options: EvalOptions) -> EvalResult:
    """Compare the run --data with the reference --compare.

    With --out, summary.json and errors.csv are written there, and three plots if matplotlib is
    installed.
    """
    run = read_losses(Path(options.data))
    reference = read_losses(Path(options.compare))
    steps = errors_by_step(run, reference)
    errors = summarise(steps, only_in_one=len(run.keys() ^ reference.keys()))
    summary = {
        "task": "loss",
        "run": options.data,
        "reference": options.compare,
        **asdict(errors),
        "passed": errors.passed,
    }
    table = format_table(errors)
    if options.out:
        out = Path(options.out)
        write_json(out / "summary.json", summary)
        write_csv(out / "errors.csv", StepErrors._fields, steps)
        curves = {options.data: curve_of(run), options.compare: curve_of(reference)}
        table += f"\n{draw(out, curves, steps)}"
    return EvalResult(summary, table)


def draw(out: Path, losses: dict[str, Curve], steps: list[StepErrors]) -> str:
    """Draw the losses of both runs, and the size of their errors. Returns a line about it."""
    draw_errors = partial(draw_curves, may_be_log=False)  # an error near 0 is no event
    relative = [(step.step, abs(step.relative)) for step in steps]
    absolute = [(step.step, step.absolute) for step in steps]
    try:
        draw_curves(out / "loss.png", losses, LOSS_LABEL)
        draw_errors(out / "relative_error.png", {"relative error": relative}, "|a - b| / b")
        draw_errors(out / "absolute_error.png", {"absolute error": absolute}, "|a - b|")
    except UserError as error:
        return f"plots: not drawn: {error}"
    return f"plots: {out / 'loss.png'}, relative_error.png, absolute_error.png"


def errors_by_step(run: Losses, reference: Losses) -> list[StepErrors]:
    """The errors of each step for which both runs have a finite loss.

    Raises UserError if there is none, or a step has no meaningful error.
    """
    errors = []
    for step in sorted(run.keys() & reference.keys()):
        a = run[step]
        b = reference[step]
        if (a is None) != (b is None):
            raise UserError(
                f"step {step}: its loss is finite in only one of the runs; "
                "they skipped different updates"
            )
        if a is None or b is None:
            continue
        if b == 0:
            raise UserError(
                f"step {step}: the reference's loss is 0, so an error relative to it has no meaning"
            )
        errors.append(StepErrors(step, a, b, relative=(a - b) / b, absolute=abs(a - b)))
    if not errors:
        raise UserError("the runs have no step with a loss in common")
    return errors


def summarise(steps: list[StepErrors], only_in_one: int) -> LossErrors:
    """The means and the largest of the errors of steps."""
    n = len(steps)
    return LossErrors(
        n=n,
        only_in_one=only_in_one,
        mean_relative=sum(step.relative for step in steps) / n,
        max_relative=max(abs(step.relative) for step in steps),
        mean_absolute=sum(step.absolute for step in steps) / n,
    )


def format_table(errors: LossErrors) -> str:
    lines = [f"{errors.n} steps in both runs, {errors.only_in_one} in only one of them"]
    for name in ("mean_relative", "max_relative", "mean_absolute"):
        line = f"{name:16}{getattr(errors, name):>+12.6f}"
        if name in LIMITS:
            verdict = "pass" if errors.passed[name] else "FAIL"
            line += f"   {verdict} (limit {LIMITS[name]})"
        lines.append(line)
    return "\n".join(lines)


def read_losses(path: Path) -> Losses:
    """The training losses of a metrics.jsonl."""
    losses: Losses = {}
    records = read_metrics(path)
    with parsing(path):
        for record in records:
            if "loss" in record:
                loss = record["loss"]
                losses[record["step"]] = None if loss is None else float(loss)
    return losses


def curve_of(losses: Losses) -> Curve:
    return [(step, loss) for step, loss in losses.items() if loss is not None]
