"""Score a LLaMA on held-out questions."""

import sys

from minillama import cli, errors, threads, train_config
from minillama.evaluation.protocols import TASKS

EXAMPLES = """
  python eval.py --task demo --ckpt runs/demo          the demo model on prompts it was never trained on
  python eval.py --task mmlu --ckpt LLAMA_DIR --data mmlu/data --compare runs/other/summary.json
  torchrun --nproc_per_node 8 eval.py --task boolq --ckpt LLAMA_DIR --data boolq/dev.jsonl --out runs/boolq
  python eval.py --list_tasks"""


def parse(arguments: list[str]):
    parser = cli.Parser(
        prog="eval.py",
        description=__doc__ + "\n" + EXAMPLES,
        usage="python eval.py --task NAME --ckpt DIR [options]",
    )
    parser.add_model_flags()
    add = parser.add_argument
    add("--task", default="", metavar="NAME", help=f"what to score on: {', '.join(TASKS)}")
    add(
        "--data",
        default="",
        metavar="PATH",
        help="the questions: a file or a folder, as --list_tasks says",
    )
    add(
        "--list_tasks",
        action="store_true",
        help="print the tasks, their protocols and the files each one reads",
    )
    add(
        "--protocol",
        default="",
        metavar="NAME",
        help="prompt, shots and scoring rule [the first that --list_tasks names]",
    )
    add(
        "--n_shots",
        type=int,
        default=None,
        metavar="N",
        help="solved examples before each question [the protocol's]",
    )
    add(
        "--subjects",
        type=train_config.parse_list,
        default=(),
        metavar="A,B",
        help="only these subjects",
    )
    add(
        "--limit",
        type=int,
        default=0,
        metavar="N",
        help="the first N questions of each subject [all; demo: 300 in all]",
    )
    add(
        "--batch_size",
        type=int,
        default=8,
        metavar="N",
        help="rows computed at once; changes no score [8]",
    )
    add(
        "--max_length",
        type=int,
        default=0,
        metavar="N",
        help="longest prompt in tokens [the model's context]",
    )
    add(
        "--compare",
        default="",
        metavar="FILE",
        help="another summary.json to stand beside; loss: the reference's metrics.jsonl",
    )
    add(
        "--out",
        default="",
        metavar="DIR",
        help="write summary.json and predictions.jsonl; an interrupted run goes on from them",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="demo: seed of the untrained model that is printed beside [0]",
    )
    options = parser.parse_args(arguments)
    parser.refuse(
        options, f"for --task {options.task}", TASKS.get(options.task, {}).get("unused", ())
    )
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if options.list_tasks:
        for name, task in TASKS.items():
            protocols = f"; protocols {', '.join(task['protocols'])}" if "protocols" in task else ""
            print(f"{name:12}{task['about']}{protocols}\n{'':12}{task['layout']}")
        return
    if options.task not in TASKS:
        asked = (
            f"no task {options.task!r}{errors.closest(options.task, TASKS)}"
            if options.task
            else "--task NAME is missing"
        )
        raise errors.UserError(f"{asked}; tasks: {', '.join(TASKS)}")
    task = TASKS[options.task]
    if missing := [
        f"--{name}"
        for name in ("ckpt", "data", "compare")
        if f"--{name}" in task["command"] and not getattr(options, name)
    ]:
        where = (
            f"; {options.task} is published at {task['published']}" if "published" in task else ""
        )
        raise errors.UserError(
            f"{' and '.join(missing)} missing; type: python eval.py --task {options.task} {task['command']}{where}"
        )
    for name, least in {"n_shots": 0, "limit": 0, "max_length": 0, "batch_size": 1}.items():
        if (value := getattr(options, name)) is not None and value < least:
            raise errors.UserError(f"--{name} {value}: must be at least {least}")
    from minillama.evaluation import compare_losses, demo, runner

    {"demo": demo, "loss": compare_losses}.get(options.task, runner).evaluate(options)


if __name__ == "__main__":
    threads.prepare_environment()
    cli.run(main, sys.argv[1:])
