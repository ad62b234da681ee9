"""What to evaluate: one dataclass, with the names and defaults of eval.py's flags."""

from dataclasses import dataclass, fields

from minillama.errors import UserError, closest
from minillama.evaluation.protocols import TASKS, Task

MINIMUMS = {"n_shots": 0, "limit": 0, "max_length": 0, "batch_size": 1}


@dataclass(frozen=True)
class EvalOptions:
    """What to score a model on, and how; `check` tells whether the options fit the task."""

    task: str = ""  # a key of protocols.TASKS
    data: str = ""  # file or directory, as the task's `layout` says
    protocol: str = ""  # "": the first one of the task
    template: str = ""  # the prompt as a user's message; "" or "none": as the protocol has it
    n_shots: int | None = None  # solved examples before each question; None: as the protocol says
    subjects: tuple[str, ...] = ()  # (): all
    limit: int = 0  # the first N questions of each subject; 0: all, and 300 in all for the demo
    batch_size: int = 8  # rows computed together; changes no score
    max_length: int = 0  # longest prompt in tokens; 0: the model's context
    compare: str = ""  # see `references`; loss: the metrics.jsonl of the reference run
    out: str = ""  # directory for summary.json and predictions.jsonl; "": they are not written
    csv: bool = False  # write the table and the predictions as CSV too
    seed: int = 0  # of the untrained model that the demo is compared with


def check(options: EvalOptions, has_model: bool) -> None:
    """Raise UserError for an option that is missing, too small or without meaning for the task."""
    task = find_task(options.task)
    given = {"ckpt"} if has_model else set()
    for option in fields(options):
        if getattr(options, option.name) != option.default:
            given.add(option.name)
    for name in task.unused:
        if name in given:
            reason = f"has no meaning for --task {task.name}"
            raise UserError(f"--{name} {reason}; leave one of them out")
    missing = [f"--{name}" for name in task.required if name not in given]
    if missing:
        command = f"python eval.py --task {task.name} {task.command}"
        source = f"; {task.name} is published at {task.published}" if task.published else ""
        raise UserError(f"{' and '.join(missing)} missing; type: {command}{source}")
    if options.csv and not options.out:
        raise UserError("--csv needs --out DIR, where summary.csv and predictions.csv are written")
    for name, minimum in MINIMUMS.items():
        value = getattr(options, name)
        if value is not None and value < minimum:
            raise UserError(f"--{name} {value}: must be at least {minimum}")


def find_task(name: str) -> Task:
    """The task of this name. Raises UserError, with the closest name, if there is none."""
    if name in TASKS:
        return TASKS[name]
    problem = "--task NAME is missing"
    if name:
        problem = f"no task {name!r}{closest(name, TASKS)}"
    raise UserError(f"{problem}; tasks: {', '.join(TASKS)}")
