"""Evaluation beside lm-evaluation-harness and a plain transformers loop: speed and memory.

All score the same questions with the same model.

    python benchmarks/evaluation.py --task mmlu --data mmlu --tokenizer t.model --shape 15m
    python benchmarks/evaluation.py --task boolq --data dev.jsonl --tokenizer t.model --shape 15m
    python benchmarks/evaluation.py --task mmlu --data mmlu --ckpt SMOLLM2_DIR --rounds 1

Every side answers by the protocol `lm_eval` with the same weights, random ones of a published shape
or those of a checkpoint, on files, read anew in a process of its own:

    minillama     `evaluation.runner.predict`, prompts and tokens included
    lm_eval       lm-evaluation-harness's own task (mmlu, 5 shots; boolq), batches of 8
    plain         transformers, one question at a time, lm_head at the last position only

Needs `pip install lm_eval transformers==4.57.6` (an environment of its own will do: this script
imports minillama from the clone). Sides take turns; figures are medians over the rounds, with the
smallest and largest. Memory is the process's peak, and how much of it came on top of what was held
before the first question (weights, imports).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:  # a child process imports what its side needs
    from minillama.evaluation.multiple_choice import MultipleChoice
    from minillama.evaluation.protocols import Question

SIDES = ("minillama", "lm_eval", "plain")
MAX_LENGTH = 2048  # tokens of a prompt
MMLU_HEADER = "The following are multiple choice questions (with answers) about {}.\n\n"

Answers = dict[str, str]  # question's id -> answer


def open_benchmark(options: argparse.Namespace, directory: Path) -> "MultipleChoice":
    """The questions by the protocol `lm_eval`, encoded by the tokenizer in `directory`."""
    from minillama.evaluation.multiple_choice import MultipleChoice
    from minillama.evaluation.options import EvalOptions
    from minillama.tokenizer import open_tokenizer

    eval_options = EvalOptions(
        options.task, str(options.data), protocol="lm_eval", limit=options.limit
    )
    return MultipleChoice(eval_options, open_tokenizer(directory), MAX_LENGTH)


def minillama(options: argparse.Namespace, directory: Path) -> Callable[[], Answers]:
    from minillama.checkpoint.hf_reader import load_model
    from minillama.comm import Mesh
    from minillama.evaluation.runner import predict
    from minillama.grid import make_grid

    model = load_model(directory).eval()

    def answer() -> Answers:
        benchmark = open_benchmark(options, directory)
        records = predict(model, benchmark, options.batch_size, None, {}, make_grid(Mesh()))
        return {record["id"]: record["predicted"] for record in records}

    return answer


def plain(options: argparse.Namespace, directory: Path) -> Callable[[], Answers]:
    import torch
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    @torch.inference_mode()
    def answer() -> Answers:
        benchmark = open_benchmark(options, directory)
        answers = {}
        for id, query in benchmark.queries.items():
            logits = model(torch.tensor([query.context]), logits_to_keep=1).logits[0, -1]
            scores = [logits[continuation[0]].item() for continuation in query.continuations]
            answers[id] = list(benchmark.protocol.choices)[scores.index(max(scores))]
        return answers

    return answer


def lm_eval(options: argparse.Namespace, directory: Path) -> Callable[[], Answers]:
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(directory / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    import lm_eval as harness
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from minillama.evaluation.protocols import TASKS
    from minillama.evaluation.questions import find_files

    tasks = directory / "tasks"
    tasks.mkdir()
    installed = Path(harness.__file__).parent / "tasks"
    names = {}
    for subject, file in find_files(TASKS[options.task], options.data).items():
        names[subject] = f"local_{subject}"
        write_harness_task(options, subject, file, tasks, installed)
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    wrapped = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size, device="cpu"
    )
    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    def answer() -> Answers:
        results = harness.simple_evaluate(
            model=wrapped,
            tasks=list(names.values()),
            task_manager=manager,
            bootstrap_iters=0,
            num_fewshot=0 if options.task == "boolq" else 5,
            log_samples=True,
        )
        choices = ("no", "yes") if options.task == "boolq" else tuple("ABCD")
        answers = {}
        for subject, name in names.items():
            for sample in results["samples"][name]:
                scores = [float(response[0]) for response in sample["filtered_resps"]]
                answers[f"{subject}/{sample['doc_id']}"] = choices[scores.index(max(scores))]
        return answers

    return answer


def write_harness_task(
    options: argparse.Namespace, subject: str, file: Path, tasks: Path, installed: Path
) -> None:
    """Write the harness's own task for a subject, with its prompts, but local files."""
    from minillama.evaluation.protocols import TASKS
    from minillama.evaluation.questions import read_questions

    is_boolq = options.task == "boolq"
    if is_boolq:
        sources = {"validation": (file, options.limit)}
        template = installed / "super_glue/boolq/default.yaml"
    else:
        shots = options.data / f"dev/{subject}_dev.csv"
        sources = {"test": (file, options.limit), "dev": (shots, 5)}
        template = installed / "mmlu/default/_default_template_yaml"
    data_files = {}
    for split, (source, limit) in sources.items():
        questions = read_questions(TASKS[options.task], subject, source)[:limit]
        lines = [json.dumps(harness_record(question, is_boolq)) + "\n" for question in questions]
        path = tasks / f"{subject}_{split}.jsonl"
        path.write_text("".join(lines))
        data_files[split] = str(path)
    about: dict[str, Any] = {
        "include": str(template),
        "task": f"local_{subject}",
        "dataset_path": "json",
        "dataset_name": None,
        "training_split": None,
        "dataset_kwargs": {"data_files": data_files},
    }
    if is_boolq:
        about["tag"] = None
    else:
        about["description"] = MMLU_HEADER.format(subject.replace("_", " "))
    (tasks / f"local_{subject}.yaml").write_text(json.dumps(about))  # JSON is YAML


def harness_record(question: "Question", is_boolq: bool) -> dict[str, Any]:
    """A question as the harness's data set has it."""
    if is_boolq:
        label = int(question["answer"] == "yes")
        return {"passage": question["passage"], "question": question["question"], "label": label}
    return {
        "question": question["question"],
        "choices": [question[letter] for letter in "ABCD"],
        "answer": "ABCD".index(question["answer"]),
    }


def run_side(options: argparse.Namespace, directory: Path) -> None:
    """In a child process: answer all questions, and print what it took."""
    import torch

    torch.set_num_threads(options.threads)
    open_side = {"minillama": minillama, "lm_eval": lm_eval, "plain": plain}[options.side]
    answer = open_side(options, directory)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    bytes_before = pages * resource.getpagesize()
    cpu_start = time.process_time()
    wall_start = time.perf_counter()
    predicted = answer()
    result = {
        "cpu": time.process_time() - cpu_start,
        "wall": time.perf_counter() - wall_start,
        "predicted": predicted,
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**result, "peak": peak / 1e6, "added": (peak - bytes_before) / 1e6}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", choices=("mmlu", "boolq"), required=True)
    add("--data", type=Path, required=True)
    add("--ckpt", type=Path, help="a real model, in place of random weights")
    add("--tokenizer", type=Path, help="of random weights")
    add("--shape", default="15m", help="of random weights: 15m, 110m")
    limit = "questions of each subject; among more questions the shots weigh less"
    add("--limit", type=int, default=100, help=limit)
    add("--batch_size", type=int, default=8)
    add("--rounds", type=int, default=5)
    threads = "1: CPU time is work alone, without waiting for another thread"
    add("--threads", type=int, default=1, help=threads)
    add("--side", default="", help=argparse.SUPPRESS)
    add("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.ckpt and not options.tokenizer:
        parser.error("--ckpt DIR, or --tokenizer FILE for random weights")
    return options


def main() -> None:
    options = parse()
    if options.side:
        run_side(options, options.directory)
        return
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        model = options.ckpt or Path(name) / "model"
        if not options.ckpt:
            write_model(options, model)
        for number in range(options.rounds):
            for side in SIDES:
                directory = Path(name) / f"{number}-{side}"
                directory.mkdir()
                for file in model.iterdir():
                    (directory / file.name).symlink_to(file)
                results[side].append(run_child(options, side, directory))
        gold = gold_answers(options, model)
    print_results(options, results, gold)


def gold_answers(options: argparse.Namespace, directory: Path) -> Answers:
    questions = open_benchmark(options, directory).questions
    return {id: question["answer"] for id, question in questions.items()}


def write_model(options: argparse.Namespace, directory: Path) -> None:
    """Random weights in a published shape."""
    import torch

    from minillama.checkpoint.hf_writer import save_model
    from minillama.hf_config import published
    from minillama.model import Llama
    from minillama.tokenizer import open_tokenizer

    config = replace(published(options.shape), max_seq_len=MAX_LENGTH)
    model = Llama(config).initialise(torch.Generator().manual_seed(0))
    save_model(model, directory, open_tokenizer(options.tokenizer))


def run_child(options: argparse.Namespace, side: str, directory: Path) -> dict[str, Any]:
    arguments = [*sys.argv[1:], "--side", side, "--directory", str(directory)]
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
    )
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def print_results(
    options: argparse.Namespace, results: dict[str, list[dict[str, Any]]], gold: Answers
) -> None:
    import torch

    ours = results["minillama"]
    predicted = ours[0]["predicted"]
    count = len(predicted)
    print(
        f"{options.task}, {count} questions, {options.ckpt or options.shape}, "
        f"{options.threads} threads, "
        f"torch {torch.__version__}"
    )
    print(
        f"{'':10}{'questions / CPU s':>24}{'minillama, by CPU time':>34}{'questions / s':>24}"
        f"{'peak MB':>20}{'of it added':>20}  same answers  correct"
    )
    for side, rounds in results.items():
        ratios = [peer["cpu"] / own["cpu"] for own, peer in zip(ours, rounds, strict=True)]
        num_same = sum(predicted[id] == name for id, name in rounds[0]["predicted"].items())
        num_right = sum(gold[id] == name for id, name in rounds[0]["predicted"].items())
        columns = [
            f"{side:10}",
            f"{spread([count / round['cpu'] for round in rounds]):>24}",
            f"{spread(ratios, 2) + ' times faster':>34}",
            f"{spread([count / round['wall'] for round in rounds]):>24}",
            f"{spread([round['peak'] for round in rounds], 0):>20}",
            f"{spread([round['added'] for round in rounds], 0):>20}",
            f"  {num_same} of {count}",
            f"  {num_right / count:.1%}",
        ]
        print("".join(columns))


def spread(values: list[float], digits: int = 1) -> str:
    median = statistics.median(values)
    return f"{median:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


if __name__ == "__main__":
    main()
