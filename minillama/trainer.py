"""One training loop for pre-training, full fine-tuning and LoRA: different data, same loop.

    for each step:
        for each of my micro-batches:     loss = sum of -log p(target) / targets of the whole global batch;   backward
        sum gradients over ranks  ->  clip their global norm  ->  AdamW at learning_rate(step)

The loss is divided by the targets of the *global* batch, counted before the first forward, so any split of one global batch into
ranks and micro-batches gives the same gradient. Everything random follows from (seed, step, micro-batch): no generator's state
is carried from step to step, and a resumed run needs only the step.
"""

import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from minillama import building, comm, config, device, report
from minillama.architecture import LlamaConfig
from minillama.checkpoint import directory as checkpoints
from minillama.checkpoint import train_state
from minillama.comm import Mesh
from minillama.config import Settings
from minillama.data.batches import Batch, BatchPlan
from minillama.errors import UserError
from minillama.estimate import training_flops
from minillama.lora import LoraConfig, save_adapter
from minillama.model import Llama
from minillama.ops import Documents
from minillama.parallel.zero import FlatAdamW
from minillama.rundir import prepare_directory
from minillama.tokenizer import Tokenizer

MAX_SKIPPED_IN_A_ROW = 5


def learning_rate(step: int, total: int, settings: Settings) -> float:
    """The rate of update `step`, counted from 0, of `total`: transformers' rule, where the first update of a warm-up is at 0.

    1. warm-up: a straight line from 0;  2. constant: stay;  3. linear or cosine: down to min_learning_rate at `total`.
    """
    peak, low = settings.learning_rate, settings.min_learning_rate
    kind = settings.lr_scheduler_type
    warmup = 0 if kind == "constant" else settings.warmup_steps or math.ceil(total * settings.warmup_ratio)
    if step < warmup:
        return peak * step / warmup
    if kind.startswith("constant"):
        return peak
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    share = 1.0 - progress if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return low + (peak - low) * share


class Trainer:
    """A run in progress: model, optimizer, plan, and where they stand."""

    def __init__(self, settings: Settings, mesh: Mesh) -> None:
        self.settings, self.mesh, self.out_dir = settings, mesh, Path(settings.out_dir)
        settings = building.with_embedded_data(settings, mesh)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.tokenizer: Tokenizer = building.build_tokenizer(settings)
        self.model, self.lora = building.build_model(settings, self.tokenizer, mesh)
        self.plan, self.eval_plan, self.template = building.build_plans(settings, self.tokenizer, self.model.config, mesh)
        self.optimizer = FlatAdamW(self.model.named_parameters(), mesh, beta1=settings.adam_beta1, beta2=settings.adam_beta2,
                                   epsilon=settings.adam_epsilon, weight_decay=settings.weight_decay)
        self.step = self.tokens = self.skipped = 0
        self.base = str(checkpoints.find_checkpoint(Path(settings.ckpt)).resolve()) if settings.ckpt else ""

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint: weights, moments, step."""
        state, tensors = train_state.load_state(checkpoint)
        if tensors["flat"].shape != self.optimizer.flat.shape:
            raise UserError(f"{checkpoint}: holds {tensors['flat'].numel():,} trained numbers, this run has {self.optimizer.flat.numel():,}")
        self.optimizer.load_state(tensors)
        self.step, self.tokens, self.skipped = state["step"], state["tokens"], state["skipped"]

    def run(self, log: report.Report) -> dict[str, Any]:
        """Train to the last step, save final/, and return the summary."""
        settings, total, losses, durations = self.settings, self.plan.total_steps, [], []
        started_tokens, eval_loss, skipped_in_a_row = self.tokens, None, 0
        epoch = self.plan.locate(self.step)[0]
        while self.step < total:
            began = time.perf_counter()
            batches = self.plan.micro_batches(self.step)
            rate = learning_rate(self.step, total, settings)
            loss, norm = self.update(batches, rate)
            seconds = time.perf_counter() - began
            skipped_in_a_row = 0 if math.isfinite(loss) and math.isfinite(norm) else skipped_in_a_row + 1
            self._stop_if_lost(skipped_in_a_row, loss)
            tokens = sum(len(batch.tokens) for batch in batches)
            self.step, self.tokens = self.step + 1, self.tokens + tokens
            durations.append(seconds)
            losses.append(loss)
            speed = tokens / seconds / self.mesh.size
            log.step(loss, speed)
            if self.step % settings.logging_steps == 0 or self.step in (1, total):
                log.record(self._record(loss, rate, norm, speed, batches))
            epoch, new_epoch = self.plan.locate(self.step)[0], epoch != self.plan.locate(self.step)[0]
            if self.eval_plan and self._is_due(settings.eval_strategy, settings.eval_steps, new_epoch):
                eval_loss = self.evaluate()
                log.record({"step": self.step, "epoch": self.plan.epoch_at(self.step), "eval_loss": eval_loss})
                log.say(f"step {self.step}: validation loss {eval_loss:.4f}")
            if self._is_due(settings.save_strategy, settings.save_steps, new_epoch) and self.step < total:
                self.save_checkpoint()
        eval_loss = self.evaluate() if self.eval_plan else eval_loss
        self.save_model(self.out_dir / "final")
        return self._summary(losses, durations, self.tokens - started_tokens, eval_loss, log.close())

    def update(self, batches: list[Batch], rate: float) -> tuple[float, float]:
        """One optimizer step on a global batch; returns (mean loss per target, gradient norm before clipping).

        A loss or norm that is not finite leaves the weights as they were, and is returned as it is.
        """
        targets = max(1, sum(batch.targets for batch in batches))
        self.optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float32, device=self.mesh.device)
        for number, batch in enumerate(batches):
            if number % self.mesh.size != self.mesh.rank:
                continue
            if self.lora and self.lora.dropout:
                torch.manual_seed(hash((self.settings.seed, self.step, number)) & 0x7FFFFFFF)
            loss = self._loss_sum(batch) / targets
            loss.backward()
            total += loss.detach()
        self.optimizer.reduce_gradients()
        loss = float(comm.all_reduce_sum(self.mesh, total))
        norm = self.optimizer.clip(self.settings.max_grad_norm)
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step(rate)
        else:
            self.skipped += 1
        return loss, norm

    def _loss_sum(self, batch: Batch) -> torch.Tensor:
        where = self.mesh.device
        tokens, labels = (torch.from_numpy(x).unsqueeze(0).to(where) for x in (batch.tokens, batch.labels))  # (1, T)
        return self.model.loss_sum(tokens, labels, Documents(batch.lengths, where))

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean loss per target of the validation data."""
        self.model.eval()
        total, targets = torch.zeros((), dtype=torch.float64), 0
        for step in range(self.eval_plan.total_steps):
            for number, batch in enumerate(self.eval_plan.micro_batches(step)):
                targets += batch.targets
                if number % self.mesh.size == self.mesh.rank:
                    total += float(self._loss_sum(batch))
        self.model.train()
        return float(comm.all_reduce_sum(self.mesh, total)) / targets

    def _stop_if_lost(self, skipped_in_a_row: int, loss: float) -> None:
        if skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
            return
        where = self.optimizer.non_finite() or "the loss"
        raise UserError(f"step {self.step}: loss {loss} or its gradient (first: {where}) was not finite {skipped_in_a_row} steps in a row; "
                        f"lower --learning_rate, or look for broken records in the data; checkpoints are in {self.out_dir}")

    def _is_due(self, strategy: str, every: int, new_epoch: bool) -> bool:
        return self.step % every == 0 if strategy == "steps" else strategy == "epoch" and new_epoch

    def _record(self, loss: float, rate: float, norm: float, speed: float, batches: list[Batch]) -> dict[str, Any]:
        return {
            "step": self.step, "epoch": round(self.plan.epoch_at(self.step), 4), "loss": loss, "learning_rate": rate, "grad_norm": norm,
            "tokens": self.tokens, "tokens_per_second": round(speed, 2), "mfu": self._utilisation(speed, batches),
            "peak_memory_bytes": device.peak_memory_bytes(self.mesh.device), "skipped": self.skipped,
        }

    def _flops_per_token(self, lengths: list[int]) -> float:
        sequence = sum(n * n for n in lengths) / sum(lengths)  # the document length that a token sees, on average
        return training_flops(self.model.config, 1.0, sequence)

    def _utilisation(self, speed: float, batches: list[Batch]) -> float | None:
        peak = self.settings.peak_tflops * 1e12
        return speed * self._flops_per_token([n for batch in batches for n in batch.lengths]) / peak if peak else None

    def save_checkpoint(self) -> None:
        if self.mesh.is_first:
            state = {"step": self.step, "tokens": self.tokens, "skipped": self.skipped, "settings": asdict(self.settings)}
            train_state.save_state(self.out_dir, self.step, self.save_model, self.optimizer.state(), state, self.settings.save_total_limit)
        comm.barrier(self.mesh)

    def save_model(self, path: Path) -> None:
        """Write the model, or the adapter alone, as a directory that transformers or peft opens."""
        if not self.mesh.is_first:
            return
        about = {"template": self.template, "made_by": "minillama train.py", "base": self.base, "settings": asdict(self.settings)}
        if self.lora is None:
            checkpoints.save_model(self.model, path, self.tokenizer, about)
            return
        save_adapter(self.model, self.lora, path, self.base)
        checkpoints.copy_tokenizer(self.tokenizer, path)
        checkpoints.write_json(path / "minillama.json", about)

    def _summary(self, losses: list[float], durations: list[float], tokens: int, eval_loss: float | None, seconds: float) -> dict[str, Any]:
        finite = [loss for loss in losses if math.isfinite(loss)]
        speed = tokens / max(sum(durations), 1e-9) / self.mesh.size
        flops = speed * self._flops_per_token(self.plan.pieces.length.tolist())
        peak = self.settings.peak_tflops
        return {
            "train_loss": sum(finite) / len(finite) if finite else None, "last_loss": finite[-1] if finite else None,
            "eval_loss": eval_loss, "steps": self.step, "tokens": self.tokens, "tokens_per_second": round(speed, 2),
            "step_seconds": round(sum(durations) / max(1, len(durations)), 4), "tflops": round(flops / 1e12, 4),
            "mfu": flops / 1e12 / peak if peak else None, "peak_memory_bytes": device.peak_memory_bytes(self.mesh.device),
            "skipped_steps": self.skipped, "seconds": round(seconds, 2), "trainable_parameters": self.optimizer.flat.numel(),
        }


def train(settings: Settings, mesh: Mesh, overwrite: bool = False) -> dict[str, Any]:
    """Run, or go on with, the training that `settings` describe; returns the summary, which is also in out_dir/summary.json."""
    checkpoint, finished = prepare_directory(settings, mesh, overwrite)
    if finished is not None:
        mesh.print(f"{settings.out_dir}: this run is finished; --overwrite_output_dir starts it over")
        return finished
    trainer = Trainer(settings, mesh)
    trainable, whole = trainer.optimizer.flat.numel(), sum(p.numel() for p in trainer.model.parameters())
    mesh.print(f"model: {whole:,} parameters, {trainable:,} trained; {trainer.plan.total_steps:,} steps on {mesh.size} × {mesh.device.type}")
    if checkpoint:
        trainer.resume(checkpoint)
        mesh.print(f"resuming {checkpoint} at step {trainer.step}, {trainer.tokens:,} tokens")
    summary = trainer.run(report.Report(trainer.out_dir, trainer.plan.total_steps, trainer.step, mesh.is_first))
    if mesh.is_first:
        checkpoints.write_json(trainer.out_dir / "summary.json", summary)
        report.plot_loss(trainer.out_dir, settings.plot_loss)
    comm.barrier(mesh)
    return summary
