"""Score a LLaMA on held-out questions."""

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from minillama import cli, threads
from minillama.compat import evaluation_flags
from minillama.errors import UserError
from minillama.evaluation.options import EvalOptions, check
from minillama.evaluation.protocols import TASKS
from minillama.options import from_flags
from minillama.train_config import parse_list

EXAMPLES = """
  python eval.py --task demo --ckpt runs/demo          prompts that the demo was never trained on
  python eval.py --task mmlu --ckpt LLAMA_DIR --data mmlu/data --compare runs/other/summary.json
  torchrun --nproc_per_node 8 eval.py --task boolq --ckpt LLAMA_DIR --data boolq --out runs/boolq
  python eval.py --list_tasks"""


class Flag(NamedTuple):
    name: str  # of a field of EvalOptions, which has the default
    type: Callable[[str], Any]
    metavar: str
    help: str


# fmt: off
FLAGS = (
    Flag("task", str, "NAME", f"what to score on: {', '.join(TASKS)}"),
    Flag("data", str, "PATH", "the questions: a file or a folder, as --list_tasks says"),
    Flag("protocol", str, "NAME",
         "prompt, shots and scoring rule [the first that --list_tasks names]"),
    Flag("template", str, "NAME|FILE.jinja",
         "give each prompt as a user's message in this template [none]"),
    Flag("n_shots", int, "N", "solved examples before each question [the protocol's]"),
    Flag("subjects", parse_list, "A,B", "only these subjects"),
    Flag("limit", int, "N", "the first N questions of each subject [all; demo: 300 in all]"),
    Flag("batch_size", int, "N", "rows computed at once; changes no score [8]"),
    Flag("max_length", int, "N", "longest prompt in tokens [the model's context]"),
    Flag("compare", str, "FILE",
         "a reference: another summary.json, or accuracies by subject as JSON or CSV; "
         "loss: the reference's metrics.jsonl"),
    Flag("out", str, "DIR",
         "write summary.json and predictions.jsonl; an interrupted run goes on from them"),
    Flag("csv", bool, "", "write summary.csv and predictions.csv below --out too"),
    Flag("seed", int, "N", "demo: seed of the untrained model that is printed beside [0]"),
)
# fmt: on


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags, with those of other systems as ours; `translation` has what is to be checked."""
    parser = cli.Parser(
        prog="eval.py",
        description=f"{__doc__}\n{EXAMPLES}",
        usage="python eval.py --task NAME --ckpt DIR [options]",
    )
    parser.add_model_flags()
    for flag in FLAGS:
        add_flag(parser, flag)
    about = "print the tasks, their protocols and the files each one reads"
    parser.add_argument("--list_tasks", action="store_true", help=about)
    evaluation_flags.TABLE.add_to(parser)
    flags = parser.parse_args(arguments)
    flags.translation = evaluation_flags.translate(vars(flags))
    vars(flags).update(flags.translation.flags)
    if flags.task == "loss":
        names = (
            "base",
            "lora",
            "tokenizer",
            "device",
            "devices",
            "tensor_parallel",
            "dtype",
            "ops",
        )
        parser.refuse(flags, "for --task loss, which loads no model", names)
    if flags.task == "demo":
        parser.refuse(flags, "for --task demo, whose model is small", ("tensor_parallel",))
    if flags.tensor_parallel < 1:
        raise UserError(f"--tensor_parallel {flags.tensor_parallel}: must be at least 1")
    return flags


def add_flag(parser: cli.Parser, flag: Flag) -> None:
    keywords: dict[str, Any] = {"type": flag.type, "metavar": flag.metavar}
    if flag.type is bool:
        keywords = cli.BOOLEAN
    default = getattr(EvalOptions, flag.name)
    parser.add_argument(f"--{flag.name}", default=default, help=flag.help, **keywords)


def main(arguments: list[str]) -> int:
    """Returns the exit code: 1 if the losses of two runs differ too much, else 0."""
    flags = parse(arguments)
    if flags.list_tasks:
        list_tasks()
        return 0
    options = from_flags(EvalOptions, vars(flags))
    check(options, has_model=bool(flags.ckpt))
    if options.task == "loss":
        return compare_losses(options)
    if options.task == "demo":
        score_demo(options, flags)
    else:
        score(options, flags)
    return 0


def list_tasks() -> None:
    for name, task in TASKS.items():
        protocols = f"; protocols {', '.join(task.protocols)}" if task.protocols else ""
        print(f"{name:12}{task.about}{protocols}")
        print(f"{'':12}{task.layout}")


def compare_losses(options: EvalOptions) -> int:
    from minillama.evaluation import compare_losses

    result = compare_losses.evaluate(options)
    print(result)
    return 0 if all(result.summary["passed"].values()) else 1


def score_demo(options: EvalOptions, flags: argparse.Namespace) -> None:
    from minillama.evaluation import demo
    from minillama.generation.loading import LoadOptions

    print(demo.evaluate(options, from_flags(LoadOptions, vars(flags))))
    print(f"next: python generate.py --ckpt {flags.ckpt} --chat")


def score(options: EvalOptions, flags: argparse.Namespace) -> None:
    """Score a model; under torchrun every rank does a part of the work, and rank 0 prints."""
    from minillama import comm
    from minillama.evaluation import runner
    from minillama.generation.loading import LoadOptions
    from minillama.generation.ranks import first_rank_prints

    load_options = from_flags(LoadOptions, vars(flags))
    check_config = flags.translation.check_numbers
    with comm.start(load_options.device, device_list=load_options.devices) as mesh:
        with first_rank_prints(mesh):
            result = runner.evaluate(
                options, load_options, mesh, mesh.print, check_config, flags.tensor_parallel
            )
        mesh.print(result)


if __name__ == "__main__":
    threads.prepare_environment()
    cli.run(main, sys.argv[1:])
