"""A run: everything that training needs, built and checked before the first step.

    settings ──▶ prepare ──▶ Run ──▶ Trainer(run).train()

`prepare` goes through the stages in one direction, and nothing goes back to an earlier one:

    1. settings and directory    read only: what is refused, finished, or continued
    2. tokenizer, data           compared with what the run began with
    3. model, optimizer

A mistake that a user can make about a run is found here, and nothing is written but the embedded
data and the token cache. `run_directory.start_run` changes the directory after that.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minillama import comm, device, ops
from minillama.adapter_checks import EMBEDDING
from minillama.checkpoint import train_state
from minillama.checkpoint.stop_tokens import with_stop_ids
from minillama.data.batches import BatchPlan
from minillama.errors import UserError
from minillama.files import parsing, sha256_of
from minillama.grid import Grid, make_grid
from minillama.launch import ranks_on_machine
from minillama.llama_config import LlamaConfig
from minillama.lora import LoraConfig
from minillama.loss_curves import require_matplotlib
from minillama.model import Llama
from minillama.parallel.sharded_optimizer import ShardedOptimizer
from minillama.threads import choose_num_threads
from minillama.tokenizer import Tokenizer
from minillama.train_config import TrainConfig
from minillama.training import (
    architecture,
    data_building,
    model_building,
    run_directory,
    settings,
)
from minillama.training.dry_run import refuse_what_cannot_fit
from minillama.training.inputs import RunInputs, describe_inputs, read_inputs, refuse_changes
from minillama.training.run_directory import ResumePoint
from minillama.training.summary import Summary

if TYPE_CHECKING:
    from minillama.parallel.pipeline import Stage


@dataclass(frozen=True)
class Run:
    """What a training run is made of, on this rank."""

    # gradient_accumulation_steps is chosen so that the global batch stays that of the continued
    # run.
    config: TrainConfig
    grid: Grid
    out_dir: Path
    base: Path | None  # the checkpoint that it starts from
    tokenizer: Tokenizer
    template: str  # "" for none
    train_batches: BatchPlan
    eval_batches: BatchPlan | None
    model: Llama
    lora: LoraConfig | None  # None: every parameter is trained
    stage: "Stage | None"  # this rank's part of a pipeline; None: it has all layers
    optimizer: ShardedOptimizer
    resume_point: ResumePoint | None  # None: it starts at step 0
    typed_config: TrainConfig  # as it was given: what train_config.json holds
    inputs: RunInputs
    in_use: tuple[str, ...]  # what it reads that may lie in out_dir

    @property
    def mesh(self) -> comm.Mesh:
        """All ranks of the run."""
        return self.grid.all

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Those of this process. They hold consecutive layers if there are several."""
        return self.mesh.devices or (self.mesh.device,)

    @property
    def num_devices(self) -> int:
        """Those of all ranks."""
        return self.mesh.size * len(set(self.devices))


@dataclass(frozen=True)
class FinishedRun:
    """A run that has nothing left to train."""

    out_dir: Path
    summary: Summary


def prepare(config: TrainConfig, mesh: comm.Mesh, overwrite: bool = False) -> Run | FinishedRun:
    """Build and check everything that a run needs. Its directory is left as it is.

    overwrite: the run that is in config.out_dir will be deleted.
    Returns a FinishedRun if nothing is left to train. Raises UserError for what cannot be run.
    """
    settings.refuse_two_divisions(config, mesh)
    settings.refuse_unlike_ranks(config, overwrite, mesh)
    grid = make_grid(mesh, config.tensor_parallel, config.pipeline_parallel)
    check_inputs(config)
    if config.plot_loss:
        with parsing("plot_loss"):
            require_matplotlib()
    run_directory.check_directory(config, overwrite)
    base = architecture.find_base(config)
    refuse_what_cannot_fit(architecture.model_config(config, base), config)
    summary = None if overwrite else run_directory.finished_summary(config)
    if summary is not None and settings.reads_recorded_files(config):
        return FinishedRun(Path(config.out_dir), summary)
    resume_point = run_directory.find_resume_point(config, overwrite, mesh)
    typed_config = config
    continued = None
    if resume_point is not None:
        continued = resume_point.directory
        settings.warn_of_changed_settings(config, continued, mesh)
        rows_per_step = resume_point.state["rows_per_step"]
        config = run_directory.with_global_batch(config, grid, rows_per_step)

    sources = data_building.with_embedded_data(config, mesh)
    tokenizer = data_building.build_tokenizer(sources, base)
    llama = architecture.model_config(config, base, tokenizer.size)
    _set_up_torch(config, llama)
    data = data_building.build_data(sources, base, tokenizer, llama, grid, continued)
    inputs = _compare_inputs(config, base, tokenizer, data, mesh, resume_point, overwrite)
    if summary is not None:
        return FinishedRun(Path(config.out_dir), summary)
    built = model_building.build_model(config, base, llama, tokenizer, grid)
    model = built.model
    pretrained = base if config.init == "pretrained" else None
    model.config = with_stop_ids(model.config, pretrained, tokenizer, data.template)
    tied = {EMBEDDING} if model.config.tie_embeddings else set()
    optimizer = ShardedOptimizer(model.named_parameters(), grid, config, tied)
    return Run(
        config=config,
        grid=grid,
        out_dir=Path(config.out_dir),
        base=base,
        tokenizer=tokenizer,
        template=data.template,
        train_batches=data.train_batches,
        eval_batches=data.eval_batches,
        model=model,
        lora=built.lora,
        stage=built.stage,
        optimizer=optimizer,
        resume_point=resume_point,
        typed_config=typed_config,
        inputs=inputs,
        in_use=(*sources.data, sources.tokenizer, sources.cache_dir),
    )


def _compare_inputs(
    config: TrainConfig,
    base: Path | None,
    tokenizer: Tokenizer,
    data: data_building.RunData,
    mesh: comm.Mesh,
    resume_point: ResumePoint | None,
    overwrite: bool,
) -> RunInputs:
    """The inputs of a run, after they were compared: those of all ranks, then now and before."""
    out_dir = Path(config.out_dir)
    before = read_inputs(out_dir)
    inputs = describe_inputs(
        base if config.init == "pretrained" else None,
        architecture.find_adapter(config),
        tokenizer,
        {"data": data.train_batches, "eval_data": data.eval_batches if config.eval_data else None},
        before.files,
    )
    all_read = dict(inputs.fingerprints)
    if resume_point is not None:
        all_read["resume"] = sha256_of(resume_point.directory / train_state.MANIFEST)
    comm.refuse_differences(mesh, all_read, "these are sha256; give every rank the same files")

    if resume_point is not None:
        saved = resume_point.state.get("fingerprints", {})
        refuse_changes(resume_point.directory, saved, inputs.fingerprints, asdict(config))
    elif not overwrite and (out_dir / "metrics.jsonl").is_file():
        refuse_changes(out_dir, before.fingerprints, inputs.fingerprints, asdict(config))
    return inputs


def check_inputs(config: TrainConfig, command: str = "python train.py") -> None:
    """Raise UserError if weights or data are missing. It names the complete command to type, and
    if both are published.
    """
    missing = {}
    if config.init == "pretrained" and not config.ckpt:
        missing["--ckpt LLAMA_DIR"] = (
            "weights: a Hugging Face LLaMA directory, such as "
            "huggingface.co/meta-llama/Llama-2-7b-hf (Meta's own .pth files: convert.py meta)"
        )
    if config.init == "scratch" and not config.tokenizer and not config.ckpt:
        missing["--tokenizer tokenizer.model"] = (
            "vocabulary: the tokenizer.model of any LLaMA checkpoint"
        )
    if not config.data:
        missing["--data alpaca_data.json"] = (
            "instruction data: Stanford Alpaca, alpaca_data.json at "
            "github.com/tatsu-lab/stanford_alpaca"
        )
    if missing:
        start = "from" if config.data else "on"
        flags = " ".join(missing)
        sources = "; ".join(missing.values())
        raise UserError(f"nothing to train {start}; type: {command} {flags}  ({sources})")


def _set_up_torch(config: TrainConfig, llama: LlamaConfig) -> None:
    device.allow_tf32(config.tf32)
    ops.choose(config.ops)
    num_threads = choose_num_threads(llama.parameter_count(), ranks_on_machine())
    torch.set_num_threads(config.threads or num_threads)
