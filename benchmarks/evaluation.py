"""Evaluation beside lm-evaluation-harness and a plain transformers loop: speed and memory.

All score the same questions with the same model.

    python benchmarks/evaluation.py --task mmlu --data mmlu --tokenizer t.model --shape 15m
    python benchmarks/evaluation.py --task boolq --data dev.jsonl --tokenizer t.model --shape 15m

Every side answers by the protocol `lm_eval` with the same random weights, on files, read anew in a
process of its own:

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
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
SIDES = ("minillama", "lm_eval", "plain")
LONGEST = 2048  # tokens of a prompt


def test_of(options: argparse.Namespace, place: Path):
    from minillama.evaluation.questions import Choices
    from minillama.tokenizer import open_tokenizer

    asked = argparse.Namespace(
        task=options.task,
        data=str(options.data),
        protocol="lm_eval",
        n_shots=None,
        subjects=(),
        limit=options.limit,
    )
    return Choices(asked, open_tokenizer(place), LONGEST)


def minillama(options: argparse.Namespace, place: Path):
    from minillama.checkpoint.hf_reader import load_model
    from minillama.comm import Mesh
    from minillama.evaluation.runner import predict

    model = load_model(place).eval()
    return lambda: {
        r["id"]: r["predicted"]
        for r in predict(model, test_of(options, place), options.batch_size, None, {}, Mesh())
    }


def plain(options: argparse.Namespace, place: Path):
    import torch
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(place, dtype=torch.float32).eval()

    @torch.inference_mode()
    def answer() -> dict[str, str]:
        test, found = test_of(options, place), {}
        for id, query in test.queries.items():
            logits = model(torch.tensor([query.context]), logits_to_keep=1).logits[0, -1]
            found[id] = max(
                zip(test.protocol.choices, query.continuations, strict=True),
                key=lambda choice: logits[choice[1][0]].item(),
            )[0]
        return found

    return answer


def lm_eval(options: argparse.Namespace, place: Path):
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(place / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    import lm_eval as harness
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from minillama.evaluation.protocols import find_files, read_questions

    installed, tasks = Path(harness.__file__).parent / "tasks", place / "tasks"
    tasks.mkdir()
    names = {}
    for subject, file in find_files(options.task, options.data).items():
        names[subject] = f"local_{subject}"
        files = {"validation" if options.task == "boolq" else "test": (file, options.limit)}
        files |= (
            {} if options.task == "boolq" else {"dev": (options.data / f"dev/{subject}_dev.csv", 5)}
        )
        for split, (source, limit) in files.items():
            rows = read_questions(options.task, subject, source)[:limit]
            records = [
                {
                    "passage": r["passage"],
                    "question": r["question"],
                    "label": int(r["answer"] == "yes"),
                }
                if options.task == "boolq"
                else {
                    "question": r["question"],
                    "choices": [r[c] for c in "ABCD"],
                    "answer": "ABCD".index(r["answer"]),
                }
                for r in rows
            ]
            (tasks / f"{subject}_{split}.jsonl").write_text(
                "".join(json.dumps(record) + "\n" for record in records)
            )
        template = installed / (
            "super_glue/boolq/default.yaml"
            if options.task == "boolq"
            else "mmlu/default/_default_template_yaml"
        )
        about = {
            "include": str(template),
            "task": names[subject],
            "dataset_path": "json",
            "dataset_name": None,
            "training_split": None,
            "dataset_kwargs": {
                "data_files": {split: str(tasks / f"{subject}_{split}.jsonl") for split in files}
            },
        }
        if options.task == "boolq":
            about["tag"] = None
        else:
            about["description"] = (
                "The following are multiple choice questions (with answers) about "
                f"{subject.replace('_', ' ')}.\n\n"
            )
        (tasks / f"{names[subject]}.yaml").write_text(json.dumps(about))  # JSON is YAML
    model = transformers.LlamaForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    tokenizer = transformers.LlamaTokenizer.from_pretrained(place)
    wrapped = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size, device="cpu"
    )
    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    def answer() -> dict[str, str]:
        results = harness.simple_evaluate(
            model=wrapped,
            tasks=list(names.values()),
            task_manager=manager,
            bootstrap_iters=0,
            num_fewshot=0 if options.task == "boolq" else 5,
            log_samples=True,
        )
        choices, found = ("no", "yes") if options.task == "boolq" else tuple("ABCD"), {}
        for subject, name in names.items():
            for sample in results["samples"][name]:
                scores = [float(response[0]) for response in sample["filtered_resps"]]
                found[f"{subject}/{sample['doc_id']}"] = choices[scores.index(max(scores))]
        return found

    return answer


def run_side(options: argparse.Namespace, place: Path) -> None:
    """In a child process: answer all questions, print what it took."""
    import torch

    torch.set_num_threads(options.threads)
    answer = {"minillama": minillama, "lm_eval": lm_eval, "plain": plain}[options.side](
        options, place
    )
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    cpu, wall = time.process_time(), time.perf_counter()
    predicted = answer()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {
                "cpu": cpu,
                "wall": wall,
                "peak": peak / 1e6,
                "added": (peak - held) / 1e6,
                "predicted": predicted,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=("mmlu", "boolq"), required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--shape", default="15m", help="a published shape: 15m, 110m")
    parser.add_argument(
        "--limit",
        type=int,
        default=100,
        help="questions of each subject; the shots weigh less among many",
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="1: CPU time means work, not waiting for the other thread",
    )
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_side(options, options.place)
        return
    import torch

    from minillama.checkpoint.hf_writer import save_model
    from minillama.hf_config import published
    from minillama.model import Llama
    from minillama.tokenizer import open_tokenizer

    rounds = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        config = replace(published(options.shape), max_seq_len=LONGEST)
        save_model(
            Llama(config).initialise(torch.Generator().manual_seed(0)),
            Path(folder) / "model",
            open_tokenizer(options.tokenizer),
        )
        for number in range(options.rounds):
            for side in SIDES:
                place = Path(folder) / f"{number}-{side}"
                place.mkdir()
                for file in (Path(folder) / "model").iterdir():
                    (place / file.name).symlink_to(file)
                done = subprocess.run(
                    [
                        sys.executable,
                        __file__,
                        *sys.argv[1:],
                        "--side",
                        side,
                        "--place",
                        str(place),
                    ],
                    capture_output=True,
                    text=True,
                    env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
                )
                if done.returncode:
                    sys.exit(f"{side} failed:\n{done.stderr}")
                rounds[side].append(json.loads(done.stdout.splitlines()[-1]))
    questions = len(rounds["minillama"][0]["predicted"])
    print(
        f"{options.task}, {questions} questions, shape {options.shape}, {options.threads} "
        f"threads, torch {torch.__version__}"
    )
    print(
        f"{'':10}{'questions / CPU s':>24}{'we are, by CPU time':>34}{'questions / s':>24}"
        f"{'peak MB':>20}{'of it added':>20}"
        "  same answers"
    )
    for side, taken in rounds.items():
        ratios = [
            theirs["cpu"] / ours["cpu"]
            for ours, theirs in zip(rounds["minillama"], taken, strict=True)
        ]
        same = sum(
            rounds["minillama"][0]["predicted"][id] == answer
            for id, answer in taken[0]["predicted"].items()
        )
        print(
            f"{side:10}{spread([questions / t['cpu'] for t in taken]):>24}"
            f"{spread(ratios, 2) + ' times faster':>34}"
            f"{spread([questions / t['wall'] for t in taken]):>24}"
            f"{spread([t['peak'] for t in taken], 0):>20}"
            f"{spread([t['added'] for t in taken], 0):>20}  {same} of {questions}"
        )


def spread(values: list[float], digits: int = 1) -> str:
    median = statistics.median(values)
    return f"{median:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


if __name__ == "__main__":
    main()
