"""One training loop for pre-training, full fine-tuning and LoRA: different data, same loop.

    for each step:
        for each of my micro-batches:
            loss = sum of -log p(target) / number of targets in the whole global batch
            backward
        sum gradients over ranks  ->  clip their global norm  ->  AdamW at learning_rate(step)

The loss is divided by the targets of the *global* batch, counted before the first forward, so any
split of one global batch into ranks and micro-batches gives the same gradient. Everything random
follows from (seed, step, micro-batch): no generator's state is carried from step to step, and a
resumed run needs only the step.
"""

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch

from minillama import comm
from minillama.checkpoint.hf_reader import non_finite_on_any_rank
from minillama.checkpoint.optimizer_files import SavedOptimizer
from minillama.data.windows import Batch
from minillama.device import seeded
from minillama.errors import UserError
from minillama.files import write_json
from minillama.ops import Documents
from minillama.train_config import TrainConfig
from minillama.training import run_directory, stages
from minillama.training.evaluation import evaluation_loss
from minillama.training.finite import SkipWatch, refuse_useless_model
from minillama.training.messages import describe_start, describe_stop
from minillama.training.metrics import TrainingLog, draw_loss, draw_missing_loss
from minillama.training.records import Progress, StepResult, figures, step_record, summarize
from minillama.training.run import FinishedRun, Run, prepare
from minillama.training.run_directory import ResumePoint
from minillama.training.saving import save_checkpoint, write_final
from minillama.training.schedule import learning_rate
from minillama.training.signals import listening
from minillama.training.summary import StepHistory, Stopped, Summary


class Trainer:
    """A run in progress: what it is made of, and where it stands."""

    def __init__(self, run: Run, stop: Sequence[str] = ()) -> None:
        """stop: a list that a signal handler fills (`signals.listening`)."""
        self.run = run
        self.config = run.config
        self.grid = run.grid
        self.mesh = run.mesh
        self.model = run.model
        self.optimizer = run.optimizer
        self.stop = stop
        self.total_steps = run.train_batches.total_steps
        self.step = 0  # updates done
        self.tokens = 0  # trained on
        self.skipped = 0  # steps without an update, because something was not finite
        self.watch = SkipWatch(run.out_dir)
        self.saved_step = 0  # of the newest checkpoint
        self.eval_loss: float | None = None  # of the newest evaluation
        self.history = StepHistory()
        if run.resume_point is not None:
            self.resume(run.resume_point)

    def train(self) -> Summary | Stopped:
        """Train to the end and write final/. Returns Stopped, after a save, if a signal came."""
        run = self.run
        log = TrainingLog(run.out_dir, self.total_steps, self.step, self.mesh.is_first)
        with closing(log):
            while self.step < self.total_steps:
                started = time.perf_counter()
                batches = run.train_batches.micro_batches(self.step)
                rate = learning_rate(self.step, self.total_steps, self.config)
                result = self.update(batches, rate)
                if isinstance(result, Stopped):
                    return replace(result, is_saved=self.save_checkpoint(log))
                seconds = time.perf_counter() - started
                self.step += 1
                self.log_step(log, result, rate, batches, seconds)
                if self.is_evaluation_due():
                    self.log_evaluation(log)
                if self.is_checkpoint_due():
                    self.save_checkpoint(log)
            refuse_useless_model(self.model, self.mesh, self.step, self.skipped, run.out_dir)
            write_final(run)
            return summarize(run, self.progress, self.history, seconds=log.close())

    def update(self, batches: list[Batch], rate: float) -> StepResult | Stopped:
        """One step on a global batch, if all is finite. Returns Stopped if a signal came."""
        self.optimizer.zero_grad()
        losses = self.forward_backward(batches)
        if isinstance(losses, Stopped):
            return losses
        mean_loss = sum(losses.tolist())
        max_norm = self.config.max_grad_norm
        step = self.optimizer.step(rate, max_norm, loss_is_finite=math.isfinite(mean_loss))
        if not step.updated:
            self.skipped += 1
        self.watch.count(self.step, mean_loss, step.updated, self.optimizer)
        return StepResult(mean_loss, step.norm)

    def forward_backward(self, batches: list[Batch]) -> torch.Tensor | Stopped:
        """Add up the gradients of this rank's micro-batches of a global batch.

        Returns each micro-batch's share of the mean loss, (len(batches),); Stopped if a signal
        came.
        """
        if self.run.stage is not None:
            signal = self.signal_on_any_rank()  # within a step, stages wait for each other
            if signal:
                return Stopped(signal, self.step)
            return stages.forward_backward(
                self.run, batches, lambda index: self.seeded_loss_sum(batches[index], index)
            )
        data = self.grid.data
        num_targets = max(1, sum(batch.targets for batch in batches))
        losses = torch.zeros(len(batches), device=data.device)  # fp32; each from one data rank
        for first in range(0, len(batches), data.size):
            signal = self.signal_on_any_rank()
            if signal:
                return Stopped(signal, self.step)
            index = first + data.rank  # micro-batch first + r is data rank r's
            loss = None
            if index < len(batches):
                loss = self.seeded_loss_sum(batches[index], index) / num_targets
                losses[index] = loss.detach()
            active_ranks = min(data.size, len(batches) - first)
            self.optimizer.backward(loss, active_ranks)
        return comm.all_reduce_sum(data, losses)

    def signal_on_any_rank(self) -> str:
        """The name of the first signal that came to a rank, the same on all ranks; "" if none."""
        if not comm.any_rank(self.mesh, bool(self.stop)):
            return ""
        signals_by_rank = comm.gather_objects(self.mesh, list(self.stop))
        first_signals = [signals[0] for signals in signals_by_rank if signals]
        return first_signals[0]

    def dropout_seed(self, micro_batch: int) -> int:
        """The seed of one micro-batch's dropout, the same whichever rank computes it."""
        sequence = np.random.SeedSequence((self.config.seed, self.step, micro_batch))
        return int(sequence.generate_state(1)[0])

    def seeded_loss_sum(self, batch: Batch, index: int) -> torch.Tensor:
        """`loss_sum` of micro-batch number `index` of this step, with its dropout."""
        with seeded(self.dropout_seed(index), self.mesh.device):
            return self.loss_sum(batch)

    def loss_sum(self, batch: Batch) -> torch.Tensor:
        """The sum of -log p over the targets of a micro-batch, ().

        With pipeline stages, only the last one returns it; the others return activations.
        """
        device = self.mesh.device
        tokens = torch.from_numpy(batch.tokens).unsqueeze(0).to(device)  # (1, T)
        labels = torch.from_numpy(batch.labels).unsqueeze(0).to(device)  # (1, T)
        return self.model.loss_sum(tokens, labels, Documents(batch.lengths, device))

    def evaluate(self) -> float:
        """The mean loss per target of the evaluation data."""
        plan = self.run.eval_batches
        assert plan is not None, "evaluate is called only if there is evaluation data"
        return evaluation_loss(self.model, plan, self.grid.data, self.losses_of)

    def losses_of(self, batches: Sequence[Batch]) -> list[float]:
        """The loss sums of micro-batches, one each."""
        if self.run.stage is not None:
            return stages.losses_of(self.run, batches, self.loss_sum)
        return [float(self.loss_sum(batch)) for batch in batches]

    def is_evaluation_due(self) -> bool:
        if self.run.eval_batches is None:
            return False
        is_last = self.step == self.total_steps
        return is_last or self.is_due(self.config.eval_strategy, self.config.eval_steps)

    def is_checkpoint_due(self) -> bool:
        is_last = self.step == self.total_steps  # then final/ is written
        return not is_last and self.is_due(self.config.save_strategy, self.config.save_steps)

    def is_due(self, strategy: str, every: int) -> bool:
        """Whether the step just taken is one of `every` steps, or the last of its epoch."""
        if strategy != "epoch":
            return strategy == "steps" and self.step % every == 0
        epoch, _ = self.run.train_batches.locate(self.step)
        epoch_before, _ = self.run.train_batches.locate(self.step - 1)
        return epoch != epoch_before

    def log_step(
        self,
        log: TrainingLog,
        result: StepResult,
        rate: float,
        batches: list[Batch],
        seconds: float,
    ) -> None:
        """Count a step, show it, and record it every `logging_steps` steps."""
        tokens = sum(len(batch.tokens) for batch in batches)
        self.tokens += tokens
        self.history.add(result.loss, seconds, tokens)
        tokens_per_second = tokens / seconds / self.run.num_devices  # of a device
        log.step(result.loss, tokens_per_second)
        is_logged = self.step % self.config.logging_steps == 0
        if not is_logged and self.step not in (1, self.total_steps):
            return
        record = step_record(self.run, self.progress, result, rate)
        lengths = [length for batch in batches for length in batch.lengths]
        log.record(record | figures(self.run, self.tokens, tokens_per_second, lengths))

    def log_evaluation(self, log: TrainingLog) -> None:
        """Evaluate, and record the loss."""
        self.eval_loss = self.evaluate()
        epoch = self.run.train_batches.epoch_at(self.step)
        log.record({"step": self.step, "epoch": epoch, "eval_loss": self.eval_loss})
        log.print(f"step {self.step}: validation loss {self.eval_loss:.4f}")

    @property
    def progress(self) -> Progress:
        return Progress(self.step, self.skipped, self.tokens, self.eval_loss)

    def save_checkpoint(self, log: TrainingLog) -> bool:
        """Write checkpoints/step-N, and return whether this step is saved; if not, train on."""
        if self.saved_step == self.step:
            return True
        name = non_finite_on_any_rank(self.model, self.mesh)
        problem: str | None = f"{name} holds NaN or infinity"
        if not name:
            problem = save_checkpoint(self.run, self.step, self.tokens, self.skipped)
        if problem:
            log.print(
                f"WARNING: step {self.step}: no checkpoint was written: {problem}; training goes on"
            )
            return False
        self.saved_step = self.step
        return True

    def resume(self, point: ResumePoint) -> None:
        """Continue from a checkpoint: weights, moments, loss scale, and what has been counted."""
        state = point.state
        if state["step"] > self.total_steps:
            raise UserError(
                f"{point.directory}: holds step {state['step']}, and this run ends after step "
                f"{self.total_steps}; raise --max_steps or --num_train_epochs"
            )
        saved = SavedOptimizer(point.directory, self.optimizer.parameters)
        self.optimizer.load_state(saved.read, state["updates"], state["loss_scale"])
        self.step = state["step"]
        self.saved_step = state["step"]
        self.tokens = state["tokens"]
        self.skipped = state["skipped"]


def train(
    config: TrainConfig, mesh: comm.Mesh | None = None, overwrite: bool = False
) -> Summary | Stopped:
    """Start, or continue, the run that `config` describes.

    mesh: None: this process is started as torchrun's environment says, alone if there is none.
    overwrite: delete the run that is in config.out_dir.
    Returns what is in out_dir/summary.json, or `Stopped` if a signal ended training before.
    """
    if mesh is None:
        with comm.start(config.device, device_list=config.devices) as own_mesh:
            return train(config, own_mesh, overwrite)
    with run_directory.locked(config, mesh):
        run = prepare(config, mesh, overwrite)
        if isinstance(run, FinishedRun):
            mesh.print(
                f"{run.out_dir}: this run is finished; --overwrite_output_dir starts it over"
            )
            draw_missing_loss(run.out_dir, config.plot_loss, mesh.is_first)
            return run.summary
        with listening() as stop:
            outcome = _train(run, stop, overwrite)
        comm.barrier(mesh)
        return outcome


def _train(run: Run, stop: Sequence[str], overwrite: bool) -> Summary | Stopped:
    trainer = Trainer(run, stop)  # a checkpoint that does not fit is refused here
    if run.mesh.is_first:
        run_directory.start_run(
            run.typed_config, run.inputs, run.resume_point, overwrite, run.in_use
        )
    run.mesh.print(describe_start(run))
    outcome = trainer.train()
    if isinstance(outcome, Stopped):
        run.mesh.print(describe_stop(outcome, overwrite))
    elif run.mesh.is_first:
        write_json(run.out_dir / "summary.json", outcome)
        draw_loss(run.out_dir, run.config.plot_loss)
    return outcome
