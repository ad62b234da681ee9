"""The leg `7b_lora` of benchmarks/cuda.py: README's recipe from the first command to the last.

A checkpoint of the 7B shape with random weights is written, and then, with the scripts:

    train.py --config 7b_lora        what --dry_run promises beside what the card counts; speed
    the same, after the end is lost  goes on from its checkpoint and ends at the same adapter
    convert.py merge-lora            the merged model
    generate.py, twice               with the adapter beside its base, and merged

The words of the data are random, so the losses mean nothing but that they fall.
"""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import cuda_sides as sides
from benchmarks.cuda_legs import Result, Settings
from minillama import presets
from minillama.chat import ALPACA
from minillama.checkpoint.hf_writer import save_model
from minillama.data import demo
from minillama.tensor_files import read_safetensors
from minillama.tokenizer import open_tokenizer, train_tokenizer
from minillama.training import estimate

ROOT = Path(__file__).resolve().parent.parent
TRAIN_STEPS = 4
NUM_RECORDS = 2000
VOCABULARY_SIZE = 500
PROMPT = "Which number is larger, 31 or 62?"


def write_inputs(settings: Settings, folder: Path) -> None:
    """A checkpoint of random weights with a vocabulary, and instruction data."""
    rng = random.Random(0)
    records = []
    for _ in range(NUM_RECORDS):
        answer = " ".join(rng.choices(demo.WORDS, k=rng.randint(20, settings.length // 4)))
        question, _ = demo.question("repeat", rng)
        records.append({"instruction": question, "input": "", "output": answer})
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    texts = [f"{ALPACA} ### Instruction: {r['instruction']} {r['output']}" for r in records[:500]]
    (folder / "tokenizer.model").write_bytes(train_tokenizer(texts, VOCABULARY_SIZE))
    model = sides.first_weights(settings.shape, settings.device)
    save_model(model, folder / "base", open_tokenizer(folder / "tokenizer.model"))


def run_script(script: str, *arguments: str) -> float:
    """Run a script of the project. Returns the seconds it took."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, script, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(arguments)}\n{done.stderr[-3000:]}")
    return time.perf_counter() - started


def train_arguments(settings: Settings, folder: Path) -> dict[str, Any]:
    """The keys of the run besides the preset's."""
    keys = {
        "ckpt": str(folder / "base"),
        "data": str(folder / "data.json"),
        "out_dir": str(folder / "run"),
        "cache_dir": str(folder / "cache"),
        "device": settings.device.type,
        "max_steps": TRAIN_STEPS,
        "save_steps": TRAIN_STEPS // 2,
        "max_length": settings.length,
        "peak_tflops": settings.peak_tflops,
    }
    if settings.shape == "tiny":
        keys["gradient_accumulation_steps"] = 2
    return keys


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    entries = read_safetensors(folder / "run/final/adapter_model.safetensors")
    return {name: entry.read() for name, entry in entries.items()}


def promised(settings: Settings, keys: dict[str, Any]) -> Result:
    """What --dry_run says of the run: state, and activations of a micro-batch."""
    config = presets.resolve("7b_lora", keys | {"data": (keys["data"],)}, {})
    llama = sides.shape_config(settings.shape)
    tokens = config.per_device_train_batch_size * settings.length
    width = estimate.bytes_per_weight(config)
    activations = estimate.activation_bytes(llama, tokens, width, config.gradient_checkpointing)
    return {
        "dry_run_state_bytes": estimate.estimate(llama, config).total,
        "dry_run_activation_bytes": activations,
    }


def train_twice(settings: Settings, folder: Path) -> Result:
    """Train; lose the end; train again. The bytes promised and counted, the speed, the resume."""
    keys = train_arguments(settings, folder)
    flags = []
    for name, value in keys.items():
        flags += [f"--{name}", str(value)]
    seconds = run_script("train.py", "--config", "7b_lora", *flags)
    summary = json.loads((folder / "run/summary.json").read_text(encoding="utf-8"))
    first = adapter_of(folder)

    shutil.rmtree(folder / "run/final")
    (folder / "run/summary.json").unlink()
    resume_seconds = run_script("train.py", "--config", "7b_lora", *flags)
    differences = []
    for name, tensor in adapter_of(folder).items():
        differences.append(float((tensor.float() - first[name].float()).abs().max()))

    return promised(settings, keys) | {
        "peak_bytes": summary["peak_memory_bytes"],
        "tokens_per_second": summary["tokens_per_second"],
        "mfu": summary["mfu"],
        "losses": [summary["train_loss"], summary["last_loss"]],
        "train_seconds": seconds,
        "resume_seconds": resume_seconds,
        "resume_difference": max(differences),
    }


def generate(settings: Settings, checkpoint: Path, output: Path) -> list[int]:
    """The ids of a greedy completion."""
    run_script(
        "generate.py",
        *("--ckpt", str(checkpoint), "--prompt", PROMPT, "--greedy", "--max_new_tokens", "32"),
        *("--dtype", "bfloat16", "--device", settings.device.type, "--output", str(output)),
    )
    record = json.loads(output.read_text(encoding="utf-8"))
    return record["completion_ids"][0]


def merge_and_generate(settings: Settings, folder: Path) -> Result:
    base, adapter = str(folder / "base"), str(folder / "run/final")
    merged = folder / "merged"
    merge_seconds = run_script(
        "convert.py", "merge-lora", "--base", base, "--lora", adapter, "--output", str(merged)
    )
    beside = generate(settings, folder / "run/final", folder / "beside.jsonl")
    alone = generate(settings, merged, folder / "alone.jsonl")
    equal = 0
    for a, b in zip(beside, alone, strict=False):
        if a != b:
            break
        equal += 1
    return {"merge_seconds": merge_seconds, "equal_tokens": equal, "tokens": len(beside)}


def lora_7b(settings: Settings, folder: Path) -> Result:
    """The whole leg, in an empty folder. 7B needs 30 GB there."""
    write_inputs(settings, folder)
    return train_twice(settings, folder) | merge_and_generate(settings, folder)
