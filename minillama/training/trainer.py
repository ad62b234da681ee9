"""One training loop for pre-training, full fine-tuning and LoRA: different data, same loop.

    for each step:
        for each of my micro-batches:     loss = sum of -log p(target) / targets of the whole global batch;   backward
        sum gradients over ranks  ->  clip their global norm  ->  AdamW at learning_rate(step)

The loss is divided by the targets of the *global* batch, counted before the first forward, so any split of one global batch into
ranks and micro-batches gives the same gradient. Everything random follows from (seed, step, micro-batch): no generator's state
is carried from step to step, and a resumed run needs only the step.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minillama import comm, device, loss_curves, ops
from minillama.checkpoint import hf_format as checkpoints
from minillama.checkpoint import train_state
from minillama.data.show import show_batch
from minillama.data.windows import Batch
from minillama.errors import UserError
from minillama.lora import save_adapter
from minillama.memory import device_memory
from minillama.ops import Documents
from minillama.parallel.sharded_optimizer import ShardedOptimizer
from minillama.threads import choose_num_threads, ranks_on_machine
from minillama.tokenizer import Tokenizer
from minillama.train_config import TrainConfig
from minillama.training import metrics, run
from minillama.training.dry_run import training_flops
from minillama.training.signals import listening

MAX_SKIPPED_IN_A_ROW = 5  # overflows of fp16 end with its smallest loss scale instead


def learning_rate(step: int, total: int, settings: TrainConfig) -> float:
    """The rate of update `step`, counted from 0, of `total`: transformers' rule, where the first update of a warm-up is at 0.
    1. warm-up: a straight line from 0;  2. constant: stay;  3. linear or cosine: down to min_learning_rate at `total`."""
    peak, low, kind = settings.learning_rate, settings.min_learning_rate, settings.lr_scheduler_type
    warmup = (
        0
        if kind == "constant"
        else settings.warmup_steps or math.ceil(total * settings.warmup_ratio)
    )
    if step < warmup:
        return peak * step / warmup
    if kind.startswith("constant"):
        return peak
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    share = 1.0 - progress if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return low + (peak - low) * share


class Trainer:
    """A run in progress: model, optimizer, plan, and where they stand."""

    def __init__(self, settings: TrainConfig, mesh: comm.Mesh, stop: Sequence[str] = ()) -> None:
        self.settings, self.mesh, self.out_dir, self.stop = (
            settings,
            mesh,
            Path(settings.out_dir),
            stop,
        )
        settings = run.with_embedded_data(settings, mesh)
        device.allow_tf32(settings.tf32)
        ops.choose(settings.ops)
        self.tokenizer: Tokenizer = run.build_tokenizer(settings)
        self.model, self.lora = run.build_model(settings, self.tokenizer, mesh)
        num_threads = choose_num_threads(self.model.config.parameter_count(), ranks_on_machine())
        torch.set_num_threads(settings.threads or num_threads)
        self.plan, self.eval_plan, self.template = run.build_plans(
            settings, self.tokenizer, self.model.config, mesh
        )
        self.optimizer = ShardedOptimizer(self.model.named_parameters(), mesh, settings)
        self.step = self.tokens = self.skipped = self.skipped_in_a_row = self.saved_step = 0
        self.base = (
            str(checkpoints.find_checkpoint(Path(settings.ckpt)).resolve()) if settings.ckpt else ""
        )

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint: weights, moments, step, loss scale."""
        state = train_state.read_state(checkpoint)
        self.optimizer.load_state(
            partial(train_state.slice_reader, checkpoint), state["updates"], state["loss_scale"]
        )
        self.step = self.saved_step = state["step"]
        self.tokens, self.skipped = state["tokens"], state["skipped"]

    def run(self, log: metrics.TrainingLog) -> dict[str, Any] | None:
        """Train to the last step, save final/, and return the summary; None where a signal stopped the run, its state saved."""
        settings, total, losses, durations = self.settings, self.plan.total_steps, [], []
        started_tokens, eval_loss = self.tokens, None
        while self.step < total:
            began, epoch = time.perf_counter(), self.plan.locate(self.step)[0]
            batches, rate = (
                self.plan.micro_batches(self.step),
                learning_rate(self.step, total, settings),
            )
            result = self.update(batches, rate)
            if result is None:
                self.save_checkpoint(log)
                log.close()
                return None
            loss, norm = result
            losses.append(loss)
            durations.append(time.perf_counter() - began)
            tokens = sum(len(batch.tokens) for batch in batches)
            self.step, self.tokens = self.step + 1, self.tokens + tokens
            speed = tokens / durations[-1] / self.mesh.size
            log.step(loss, speed)
            scale = (
                {"loss_scale": self.optimizer.loss_scale.scale} if self.optimizer.loss_scale else {}
            )
            if self.step % settings.logging_steps == 0 or self.step in (1, total):
                log.record(
                    {
                        "step": self.step,
                        "epoch": round(self.plan.epoch_at(self.step), 4),
                        "loss": loss,
                        "learning_rate": rate,
                        "grad_norm": norm,
                        "skipped": self.skipped,
                        **scale,
                        **self._rates(speed, [n for batch in batches for n in batch.lengths]),
                    }
                )
            new_epoch = self.plan.locate(self.step)[0] != epoch
            if self.eval_plan and (
                self._is_due(settings.eval_strategy, settings.eval_steps, new_epoch)
                or self.step == total
            ):
                eval_loss = self.evaluate()
                log.record(
                    {
                        "step": self.step,
                        "epoch": self.plan.epoch_at(self.step),
                        "eval_loss": eval_loss,
                    }
                )
                log.say(f"step {self.step}: validation loss {eval_loss:.4f}")
            if (
                self._is_due(settings.save_strategy, settings.save_steps, new_epoch)
                and self.step < total
            ):
                self.save_checkpoint(log)
        self.save_model(self.out_dir / "final")
        finite = [loss for loss in losses if math.isfinite(loss)]
        speed = (self.tokens - started_tokens) / max(sum(durations), 1e-9) / self.mesh.size
        return {
            "train_loss": sum(finite) / len(finite) if finite else None,
            "last_loss": finite[-1] if finite else None,
            "eval_loss": eval_loss,
            "steps": self.step,
            "step_seconds": round(sum(durations) / max(1, len(durations)), 4),
            "skipped_steps": self.skipped,
            "seconds": round(log.close(), 2),
            "trainable_parameters": self.optimizer.num_trained,
            **self._rates(speed, self.plan.windows.length.tolist()),
        }

    def update(self, batches: list[Batch], rate: float) -> tuple[float, float] | None:
        """One optimizer step on a global batch; returns (mean loss per target, gradient norm before clipping).
        A loss or norm that is not finite leaves the weights as they were, and is returned as it is. None: a signal reached some rank, so
        all ranks gave the step up between two micro-batches."""
        targets, size = max(1, sum(batch.targets for batch in batches)), self.mesh.size
        self.optimizer.zero_grad()
        losses = torch.zeros(
            len(batches), device=self.mesh.device
        )  # fp32, as the losses are: each is one rank's
        for first in range(0, len(batches), size):  # micro-batch a·N + r is rank r's
            if comm.any_rank(self.mesh, bool(self.stop)):
                return None
            number, loss = first + self.mesh.rank, None
            if number < len(batches):
                drawn = np.random.SeedSequence(
                    (self.settings.seed, self.step, number)
                ).generate_state(1)[0]  # dropout's
                with device.seeded(int(drawn), self.mesh.device):
                    loss = self._loss_sum(batches[number]) / targets
                losses[number] = loss.detach()
            self.optimizer.backward(loss, min(size, len(batches) - first))
        loss = sum(comm.all_reduce_sum(self.mesh, losses).tolist())
        norm, updated = self.optimizer.step(rate, self.settings.max_grad_norm, math.isfinite(loss))
        self.skipped += not updated
        is_overflow = math.isfinite(loss) and self.optimizer.loss_scale is not None
        self.skipped_in_a_row = 0 if updated or is_overflow else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            where = self.optimizer.first_non_finite() or "the loss"
            raise UserError(
                f"step {self.step}: loss {loss} or its gradient (first: {where}) was not finite {self.skipped_in_a_row} steps "
                f"in a row; lower --learning_rate, or look for broken records in the data; checkpoints are in {self.out_dir}"
            )
        return loss, norm

    def _loss_sum(self, batch: Batch) -> torch.Tensor:
        where = self.mesh.device
        tokens, labels = (
            torch.from_numpy(x).unsqueeze(0).to(where) for x in (batch.tokens, batch.labels)
        )  # (1, T)
        return self.model.loss_sum(tokens, labels, Documents(batch.lengths, where))

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean loss per target of the validation data."""
        self.model.eval()
        total, targets = 0.0, 0
        for step in range(self.eval_plan.total_steps):
            batches = self.eval_plan.micro_batches(step)
            targets += sum(batch.targets for batch in batches)
            total += sum(
                float(self._loss_sum(batch)) for batch in batches[self.mesh.rank :: self.mesh.size]
            )
        self.model.train()
        return sum(comm.gather_objects(self.mesh, total)) / targets

    def _is_due(self, strategy: str, every: int, new_epoch: bool) -> bool:
        return self.step % every == 0 if strategy == "steps" else strategy == "epoch" and new_epoch

    def _rates(self, speed: float, lengths: list[int]) -> dict[str, Any]:
        """What records and the summary both tell. speed: tokens a second on each device, in documents of these lengths."""
        sequence = sum(n * n for n in lengths) / sum(
            lengths
        )  # the document length that a token sees, on average
        tflops, peak = (
            speed * training_flops(self.model.config, 1.0, sequence) / 1e12,
            self.settings.peak_tflops,
        )
        return {
            "tokens": self.tokens,
            "tokens_per_second": round(speed, 2),
            "tflops": round(tflops, 4),
            "mfu": tflops / peak if peak else None,
            "peak_memory_bytes": device_memory(self.mesh.device).peak,
        }

    def save_checkpoint(self, log: metrics.TrainingLog) -> None:
        """Write checkpoints/step-N; where that fails, say so loudly and go on: the checkpoints before it are still there."""
        if self.saved_step == self.step:
            return
        self.saved_step = self.step
        optimizer = self.optimizer.state()
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "updates": optimizer.updates,
            "rows_per_step": self.plan.rows_per_step,
            "loss_scale": optimizer.loss_scale,
        }
        slices = [(part.start, part.tensors) for part in optimizer.slices]
        problem = train_state.save_state(
            self.out_dir,
            self.step,
            self.mesh,
            slices,
            state,
            self.save_model,
            self.settings.save_total_limit,
        )
        if problem:
            log.say(
                f"WARNING: step {self.step}: no checkpoint was written: {problem}; training goes on"
            )

    def save_model(self, path: Path) -> None:
        """Write the model, or the adapter alone, as a directory that transformers or peft opens."""
        if not self.mesh.is_first:
            return
        about = {
            "template": self.template,
            "made_by": "minillama train.py",
            "base": self.base,
            "settings": asdict(self.settings),
        }
        if self.lora is None:
            checkpoints.save_model(self.model, path, self.tokenizer)
        else:
            save_adapter(self.model, self.lora, path, self.base)
            checkpoints.copy_tokenizer(self.tokenizer.path, path)
        checkpoints.write_json(path / "minillama.json", about)


def train(settings: TrainConfig, mesh: comm.Mesh, overwrite: bool = False) -> dict[str, Any] | None:
    """Run, or go on with, the training that `settings` describe; returns the summary, which is also in out_dir/summary.json.
    None: a signal stopped the run, and its state is saved."""
    checkpoint, finished = run.prepare_directory(settings, mesh, overwrite)
    if finished is not None:
        mesh.print(
            f"{settings.out_dir}: this run is finished; --overwrite_output_dir starts it over"
        )
        return finished
    if checkpoint:
        settings = run.with_global_batch(
            settings, mesh, train_state.read_state(checkpoint)["rows_per_step"]
        )
    with listening() as stop:
        trainer = Trainer(settings, mesh, stop)
        mesh.print(
            f"model: {sum(p.numel() for p in trainer.model.parameters()):,} parameters, {trainer.optimizer.num_trained:,} trained; "
            f"{trainer.plan.total_steps:,} steps on {mesh.size} × {mesh.device.type}"
        )
        if checkpoint:
            trainer.resume(checkpoint)
            mesh.print(f"resuming {checkpoint} at step {trainer.step}, {trainer.tokens:,} tokens")
        summary = trainer.run(
            metrics.TrainingLog(
                trainer.out_dir, trainer.plan.total_steps, trainer.step, mesh.is_first
            )
        )
        if summary is None:
            signal = stop[0] if stop else "a signal to another rank"
            mesh.print(
                f"stopped by {signal} after step {trainer.step}; the same command goes on from there"
            )
        elif mesh.is_first:
            checkpoints.write_json(trainer.out_dir / "summary.json", summary)
            loss_curves.plot_loss(trainer.out_dir, settings.plot_loss)
        comm.barrier(mesh)
    return summary


def show_first_batch(settings: TrainConfig, mesh: comm.Mesh) -> str:
    """The text of step 0's first micro-batch, with the trained tokens marked."""
    settings = run.with_embedded_data(settings, mesh)
    tokenizer = run.build_tokenizer(settings)
    plan, _, template = run.build_plans(
        settings, tokenizer, run.model_config(settings, tokenizer.size), mesh
    )
    return f"template: {template}\n{show_batch(tokenizer, plan.micro_batches(0)[0], color=sys.stdout.isatty())}"
