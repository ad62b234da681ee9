"""Short runs that are stopped and resumed, for the tests of the state of a run."""

import hashlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import torch

from minillama import comm, train_config
from minillama.checkpoint.optimizer_files import SavedOptimizer
from minillama.checkpoint.run_directory import checkpoint_path
from minillama.data import demo
from minillama.parallel.parts import Part, WholeParameter
from minillama.tensor_files import read_safetensors
from minillama.tokenizer import train_tokenizer
from minillama.training import trainer
from minillama.training.summary import Stopped

STEPS = 6


def make_settings(folder: Path) -> train_config.TrainConfig:
    """A run of six steps, four micro-batches each, of a model with a few thousand parameters."""
    records = demo.records(demo.DEMO, 200, seed=3, held_out=False)
    (folder / "data.json").write_text(json.dumps(records))
    (folder / "tokenizer.model").write_bytes(
        train_tokenizer((r["instruction"] for r in records), 330)
    )
    return train_config.TrainConfig(
        init="scratch",
        dim=16,
        n_layers=2,
        n_heads=2,
        ffn_dim=32,
        context=64,
        tokenizer=str(folder / "tokenizer.model"),
        data=(str(folder / "data.json"),),
        cache_dir=str(folder / "cache"),
        template="llama_factory_default",
        max_length=64,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=0,
        reduction="exact",
        threads=1,
        device="cpu",
        plot_loss=False,
    )


def train_here(run: train_config.TrainConfig, stop_after: int = 0) -> int:
    """Train on this rank; returns the number of steps done.

    stop_after: send a SIGTERM to the last rank after so many steps; all ranks stop together.
    """
    torch.set_num_threads(1)
    with comm.start("cpu", timeout_minutes=1) as mesh:
        data_ranks = mesh.size // (run.tensor_parallel * run.pipeline_parallel)
        settings_here = replace(
            run, gradient_accumulation_steps=run.gradient_accumulation_steps // data_ranks
        )
        if stop_after:
            original = trainer.Trainer.update

            def update(self, batches, rate):
                if self.step == stop_after and mesh.rank == mesh.size - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                return original(self, batches, rate)

            trainer.Trainer.update = update
        outcome = trainer.train(settings_here, mesh)
        return outcome.step if isinstance(outcome, Stopped) else STEPS


def fingerprint(run: train_config.TrainConfig, step: int = 4) -> str:
    """A sha256 of the final weights, and of the optimizer's state at a step.

    The state is read by name, so it does not matter which rank wrote which file.
    """
    final = Path(run.out_dir) / "final" / "model.safetensors"
    digest = hashlib.sha256(final.read_bytes())
    shapes = {name: tensor.shape for name, tensor in read_safetensors(final).items()}
    parameters = {name: WholeParameter(shape, torch.float32) for name, shape in shapes.items()}
    saved = SavedOptimizer(checkpoint_path(Path(run.out_dir), step), parameters)
    for name, parameter in parameters.items():
        for vector in ("master", "m", "v"):
            values = saved.read(Part(name, parameter.shape), vector, 0, parameter.size)
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()
