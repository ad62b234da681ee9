"""The Python API of evaluation: `minillama.evaluate`."""

from pathlib import Path
from typing import Any

from minillama.evaluation import compare_losses, demo, runner
from minillama.evaluation.options import EvalOptions, check
from minillama.evaluation.report import EvalResult
from minillama.generation.api import LoadedModel
from minillama.options import from_keywords


def evaluate(task: str, model: LoadedModel | None = None, **options: Any) -> EvalResult:
    """Score a model on a task; the result has the `summary`, and prints as the table.

        minillama.evaluate("boolq", model, data="boolq/dev.jsonl", limit=200)

    options: data, n_shots, subjects, …, as eval.py's flags; see `EvalOptions`.
    Raises UserError for an option that is unknown, missing or without meaning for the task.
    """
    keywords = {"task": task}
    for name, value in options.items():
        keywords[name] = str(value) if isinstance(value, Path) else value
    eval_options = from_keywords(EvalOptions, keywords)
    check(eval_options, has_model=model is not None)
    if model is None:
        return compare_losses.evaluate(eval_options)  # the only task without a model
    if task == "demo":
        return demo.evaluate(eval_options, model.engine)
    mesh = model.engine.mesh  # one rank, or those that divide the model
    return runner.evaluate(eval_options, model.engine, mesh, tensor_parallel=mesh.size)
