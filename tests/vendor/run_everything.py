"""`python -m tests.vendor.run_everything NAME FOLDER`: every command on a device called NAME.

Train, stop, resume, generate and shard, on a fake device or on the cpu.

Each part is a forked process of this one, which itself never touches the device; the result is
FOLDER/result.json.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minillama import comm, device, train_config
from minillama.generation.loading import load_with_adapters
from minillama.generation.sampling import Sampling
from minillama.memory import device_memory
from minillama.training import trainer
from minillama.training.summary import Stopped
from tests.conftest import TEXTS, generate
from tests.ranks import run_on_ranks
from tests.vendor import ascend, cambricon, fake_device, sophgo


def settings(folder: Path, out: str, **changes: object) -> train_config.TrainConfig:
    return train_config.TrainConfig(
        **{
            "tokenizer": str(folder / "tokenizer.model"),
            "data": (str(folder / "data.json"),),
            "template": "llama_factory_default",
            "init": "scratch",
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 2,
            "ffn_dim": 48,
            "context": 128,
            "max_length": 128,
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "validation_split": 0.2,
            "save_strategy": "steps",
            "save_steps": 2,
            "save_total_limit": 0,
            "threads": 1,
            "cache_dir": str(folder / "cache"),
            "out_dir": str(folder / out),
        }
        | changes
    )


def losses(out_dir: str) -> list[float]:
    records = [
        json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()
    ]
    return [record["loss"] for record in records if "loss" in record]


def train(name: str, folder: Path, out: str, **changes: object) -> dict:
    """Train on this rank; the losses, the validation loss, and which kernels of the vendor ran."""
    if name != "cpu":
        fake_device.install(name)
    wanted = settings(folder, out, **changes)
    with comm.start(wanted.device, timeout_minutes=1) as mesh:
        assert mesh.device.type == name
        summary = trainer.train(wanted, mesh)
        comm.barrier(mesh)
        return {
            "losses": losses(wanted.out_dir),
            "eval_loss": summary["eval_loss"],
            "kernels": kernels(),
            "peak": summary["peak_memory_bytes"] == device_memory(mesh.device).peak,
        }


def stop_and_resume(name: str, folder: Path) -> list[float]:
    """The losses of a run that a signal stops after its first step, and that resumes."""
    update = trainer.Trainer.update

    def signalled(self: trainer.Trainer, batches: list, rate: float) -> object:
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, batches, rate)

    if name != "cpu":
        fake_device.install(name)
    wanted = settings(folder, "resumed", zero_stage=1)
    with comm.start(timeout_minutes=1) as mesh:
        trainer.Trainer.update = signalled
        assert isinstance(trainer.train(wanted, mesh), Stopped)
        trainer.Trainer.update = update
        assert trainer.train(wanted, mesh)["steps"] == 3
    return losses(wanted.out_dir)


def kernels() -> list[str]:
    return sorted({*ascend.CALLS, *cambricon.CALLS, *sophgo.CALLS})


def write(name: str, checkpoint: Path, dtype: str) -> dict:
    if name != "cpu":
        fake_device.install(name)
    model, _ = load_with_adapters(checkpoint, "", [], dtype, [device.pick("auto")])
    assert model.lm_head.weight.device.type == name
    return {
        "ids": list(generate(model, [1, 5, 9, 30], 8, Sampling(temperature=0.0))),
        "kernels": kernels(),
    }


def main(name: str, folder: Path, checkpoint: Path) -> None:
    """checkpoint: what to generate from, the same for every device."""
    torch.set_num_threads(1)
    records = [
        {"instruction": f"{TEXTS[i % 9]} {i}", "input": "", "output": TEXTS[(i + 3) % 9]}
        for i in range(24)
    ]
    (folder / "data.json").write_text(json.dumps(records))
    sys.modules["matplotlib"] = None  # no time for plots
    result = {
        "one": isolated(train, name, folder, "one"),
        "text": isolated(write, name, checkpoint, "float32"),
    }
    if name != "cpu":
        result |= {
            "resumed": isolated(stop_and_resume, name, folder),
            "text16": isolated(write, name, checkpoint, "bfloat16"),
            "ranks": [
                run_on_ranks(2, train_on_two, name, folder, stage, timeout=200)[0]
                for stage in (1, 2)
            ],
        }
    (folder / "result.json").write_text(json.dumps(result))


def isolated(function: Callable, *arguments: object) -> Any:
    return run_on_ranks(1, function, *arguments, timeout=200)[0]


def train_on_two(name: str, folder: Path, stage: int) -> dict:
    return train(name, folder, f"stage{stage}", zero_stage=stage, gradient_accumulation_steps=1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
