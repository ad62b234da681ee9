"""Small training runs, and what tests look at in them."""

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from minillama.checkpoint.hf_writer import save_model
from minillama.comm import Mesh
from minillama.data import demo
from minillama.loss_curves import read_metrics
from minillama.parallel.sharded_optimizer import ShardedOptimizer
from minillama.tensor_files import read_safetensors
from minillama.tokenizer import open_tokenizer, train_tokenizer
from minillama.train_config import TrainConfig
from minillama.training.run import FinishedRun, prepare
from minillama.training.trainer import Trainer
from tests.conftest import random_model, random_tokens

# A run draws its losses. Ranks are forked, and each run would import matplotlib in its first rank.
os.environ.setdefault("MPLBACKEND", "Agg")
with suppress(ImportError):
    import matplotlib.backends.backend_agg
    import matplotlib.pyplot  # noqa: F401


def write_inputs(folder: Path) -> None:
    """Write an instruction file, a text, a vocabulary, and a random LLaMA that fits it."""
    records = demo.records(("first", "repeat", "larger"), 300, seed=0, held_out=False)
    (folder / "alpaca.json").write_text(json.dumps(records))
    (folder / "text.txt").write_text(" ".join(record["instruction"] for record in records))
    texts = [record["instruction"] + record["output"] for record in records]
    (folder / "tokenizer.model").write_bytes(train_tokenizer(texts, 320))
    tokenizer = open_tokenizer(folder / "tokenizer.model")
    model = random_model(vocab_size=tokenizer.size, max_seq_len=128)
    save_model(model, folder / "base", tokenizer)


def small_run(inputs: Path, directory: Path, **changes) -> TrainConfig:
    """The settings of a run of six steps on the files of `write_inputs`; `changes` change them."""
    standard = {
        "ckpt": str(inputs / "base"),
        "data": (str(inputs / "alpaca.json"),),
        "template": "llama_factory_default",
        "max_length": 96,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "cache_dir": str(inputs / "cache"),
        "out_dir": str(directory),
        "save_strategy": "no",
        "device": "cpu",
    }
    return TrainConfig(**standard | changes)


def new_trainer(config: TrainConfig) -> Trainer:
    """The trainer of a run on one rank, before its first step."""
    run = prepare(config, Mesh())
    assert not isinstance(run, FinishedRun)
    return Trainer(run)


def losses_of(out_dir: Path | str) -> list[float]:
    records = read_metrics(Path(out_dir) / "metrics.jsonl")
    return [record["loss"] for record in records if "loss" in record]


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    file = next(directory.glob("*model.safetensors"))
    return {name: entry.read() for name, entry in read_safetensors(file).items()}


def flat_weights(optimizer: ShardedOptimizer) -> torch.Tensor:
    return optimizer.vectors[0].master[: optimizer.num_trained]


def flat_gradient(optimizer: ShardedOptimizer) -> torch.Tensor:
    return optimizer.vectors[0].gradients.reduced()[: optimizer.num_trained]


def torch_adamw(model: torch.nn.Module, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """As transformers' Trainer groups them: matrices decay, norms and biases do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)


def loss_of(model: torch.nn.Module, step: int) -> torch.Tensor:
    tokens = random_tokens(2, 16, seed=step)
    return model.loss_sum(tokens, tokens.roll(-1, 1)) / 32


class Interruption(Exception):
    """The machine loses its power."""


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next run end, without saving anything, when it has done `step` steps."""
    update = Trainer.update

    def interrupted(self: Trainer, *arguments):
        if self.step == step:
            raise Interruption
        return update(self, *arguments)

    monkeypatch.setattr(Trainer, "update", interrupted)
