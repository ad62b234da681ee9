"""What users run, each in a folder of its own, and what comes of it when nothing disturbs it."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minillama.checkpoint.hf_writer import save_model
from minillama.conversion.delta import make_delta
from minillama.conversion.meta import hf_to_meta
from minillama.conversion.writer import Output
from minillama.lora import LoraConfig, add_lora, save_adapter
from minillama.tokenizer import open_tokenizer, train_tokenizer
from tests.conftest import TEXTS, random_model
from tests.faults.commands import run_command
from tests.runs import write_inputs

TRAIN = (
    "train.py --ckpt base --data alpaca.json --template llama_factory_default --max_length 96 "
    "--per_device_train_batch_size 2 --max_steps 4 --learning_rate 3e-3 --logging_steps 1 "
    "--save_strategy steps --save_steps 2 --cache_dir cache --out_dir run --device cpu --threads 1"
)
GENERATE = (
    "generate.py --ckpt base --prompt_file prompts.txt --greedy --max_new_tokens 4 --batch_size 1 "
    "--output out.jsonl --device cpu"
)
EVAL = (
    "eval.py --ckpt base --task perplexity --data text.txt --max_length 100 --batch_size 1 "
    "--limit 1 --out scores --device cpu"
)
LOGS = ("run/metrics.jsonl", "run/trainer_log.jsonl")
# What depends on the clock and the machine, and a mean over the steps of the last command.
UNLIKE = {
    "train_loss",
    "seconds",
    "step_seconds",
    "tokens_per_second",
    "tflops",
    "mfu",
    "samples_per_second",
    "elapsed_time",
    "remaining_time",
    "peak_memory_bytes",
    "mtime_ns",
}


@dataclass(frozen=True)
class Scenario:
    """A command, and what stands in its folder before."""

    command: str
    prepare: Callable[[Path], object] | None = None  # beside the inputs that all have
    output: str = ""  # what existed before and stays until its successor is complete
    given_up: tuple[str, ...] = ()  # what existed before, and the command replaces in its own time


def write_world(folder: Path) -> None:
    """Write inputs of every command: models, an adapter, deltas, Meta's layout, data, prompts."""
    folder.mkdir()
    write_inputs(folder)
    tokenizer = open_tokenizer(folder / "base")
    target = random_model(1, vocab_size=tokenizer.size, max_seq_len=128)
    save_model(target, folder / "target", tokenizer)
    make_delta(folder / "base", folder / "target", Output(folder / "delta"))
    hf_to_meta(folder / "base", Output(folder / "meta"))
    lora = LoraConfig(rank=2, alpha=4, targets=("q_proj", "v_proj"))
    add_lora(target, lora, torch.Generator().manual_seed(0))
    save_adapter(target, lora, folder / "adapter", str(folder / "base"))
    (folder / "other.model").write_bytes(train_tokenizer(TEXTS * 3, 400))
    (folder / "prompts.txt").write_text("one\ntwo\nthree\n")
    (folder / "text.txt").write_text(" ".join(TEXTS) * 2)


def older_output(folder: Path) -> None:
    """Write what earlier commands left under the names of the outputs."""
    for name in ("merged", "sum"):
        shutil.copytree(folder / "target", folder / name)
    shutil.copy(folder / "other.model", folder / "joined.model")
    shutil.copytree(folder / "meta", folder / "pth")


def older_dataset(folder: Path) -> None:
    done_before(
        "convert.py data --input alpaca.json --tokenizer tokenizer.model --output set", folder
    )


def finished_run(folder: Path) -> None:
    """Write a run of other settings."""
    done_before(f"{TRAIN} --seed 7", folder)


def interrupted_run(folder: Path) -> None:
    """Write a run that was killed in its last step."""
    done_before(TRAIN, folder)
    run = folder / "run"
    for name in ("summary.json", "loss.png"):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "final")


def done_before(command: str, folder: Path) -> None:
    outcome = run_command(command, folder, folder.parent / "report")
    assert outcome.code == 0, outcome.stderr


SCENARIOS = {
    "meta": Scenario("convert.py meta --input meta --output hf"),
    "meta --reverse": Scenario("convert.py meta --reverse --input base --output pth2 --shards 1"),
    "meta --reverse --overwrite": Scenario(
        "convert.py meta --reverse --input target --output pth --overwrite", older_output, "pth"
    ),
    "apply-delta": Scenario("convert.py apply-delta --base base --delta delta --output sum"),
    "apply-delta --overwrite": Scenario(
        "convert.py apply-delta --base base --delta delta --output sum --overwrite --bin",
        older_output,
        "sum",
    ),
    "make-delta": Scenario("convert.py make-delta --base base --target target --output difference"),
    "merge-lora": Scenario(
        "convert.py merge-lora --base base --lora adapter --output merged --max_shard_size 20kb"
    ),
    "merge-lora --overwrite": Scenario(
        "convert.py merge-lora --base base --lora adapter --output merged --overwrite",
        older_output,
        "merged",
    ),
    "tokenizer": Scenario(
        "convert.py tokenizer --base tokenizer.model --add other.model --output joined.model"
    ),
    "tokenizer --overwrite": Scenario(
        "convert.py tokenizer --base tokenizer.model --add other.model --output joined.model "
        "--overwrite",
        older_output,
        "joined.model",
    ),
    "data": Scenario(
        "convert.py data --input alpaca.json --tokenizer tokenizer.model --output set"
    ),
    "sha256": Scenario("convert.py sha256 base"),
    "generate": Scenario(GENERATE),
    "eval": Scenario(EVAL),
    "train": Scenario(TRAIN),
    "train, resumed": Scenario(TRAIN, interrupted_run, given_up=LOGS),
    "train --overwrite_output_dir": Scenario(
        f"{TRAIN} --overwrite_output_dir", finished_run, given_up=("run/",)
    ),
}


def hashes_of(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file in a folder, by name."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes


def content_of(folder: Path) -> dict[str, Any]:
    """Return what is in a folder, by name: JSON without what differs from run to run, or hashes."""
    content: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            content[name] = path.readlink()
        elif path.is_dir():
            content[name] = "directory"
        else:
            content[name] = _content_of_file(path)
    return content


def _content_of_file(path: Path) -> Any:
    raw = path.read_bytes()
    if path.suffix == ".jsonl":
        return [_alike(json.loads(line)) for line in raw.splitlines()]
    if path.suffix == ".json" and path.stat().st_size < 100_000:
        return _alike(json.loads(raw))
    return hashlib.sha256(raw).hexdigest()


def _alike(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _alike(inner) for key, inner in value.items() if key not in UNLIKE}
    return value
