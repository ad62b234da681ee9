"""A run: everything that training needs, built and checked before the first step.

    settings ──▶ prepare ──▶ Run ──▶ Trainer(run).train()

`prepare` goes through the stages in one direction, and nothing goes back to an earlier one:

    1. settings and directory    read only: what is refused, finished, or continued
    2. tokenizer, data, model, optimizer
    3. directory                 emptied if asked for, and train_config.json written

A mistake that a user can make about a run is found in the first two stages. They write nothing but
the embedded data and the token cache.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from minillama import comm, device, ops
from minillama.data.batches import BatchPlan
from minillama.errors import UserError
from minillama.launch import ranks_on_machine
from minillama.llama_config import LlamaConfig
from minillama.lora import LoraConfig
from minillama.model import Llama
from minillama.parallel.sharded_optimizer import ShardedOptimizer
from minillama.threads import choose_num_threads
from minillama.tokenizer import Tokenizer
from minillama.train_config import TrainConfig
from minillama.training import data_building, model_building, run_directory
from minillama.training.dry_run import refuse_what_cannot_fit
from minillama.training.run_directory import ResumePoint
from minillama.training.summary import Summary


@dataclass(frozen=True)
class Run:
    """What a training run is made of, on this rank."""

    config: TrainConfig  # its accumulation makes the global batch of the run that is continued
    mesh: comm.Mesh
    out_dir: Path
    base: Path | None  # the checkpoint that it starts from
    tokenizer: Tokenizer
    template: str  # "" for none
    train_batches: BatchPlan
    eval_batches: BatchPlan | None
    model: Llama
    lora: LoraConfig | None  # None: every parameter is trained
    optimizer: ShardedOptimizer
    resume_point: ResumePoint | None  # None: it starts at step 0


@dataclass(frozen=True)
class FinishedRun:
    """A run that has nothing left to train."""

    summary: Summary


def prepare(config: TrainConfig, mesh: comm.Mesh, overwrite: bool = False) -> Run | FinishedRun:
    """Build and check everything that a run needs, then write its directory.

    overwrite: delete the run that is in config.out_dir. Raises UserError for what cannot be run.
    """
    check_inputs(config)
    run_directory.check_directory(config, overwrite)
    base = model_building.find_base(config)
    refuse_what_cannot_fit(model_building.model_config(config, base), config)
    summary = None if overwrite else run_directory.finished_summary(config)
    if summary is not None:
        return FinishedRun(summary)
    resume_point = run_directory.find_resume_point(config, overwrite, mesh)
    typed_config = config
    continued = None
    if resume_point is not None:
        continued = resume_point.directory
        rows_per_step = resume_point.state["rows_per_step"]
        config = run_directory.with_global_batch(config, mesh, rows_per_step)

    sources = data_building.with_embedded_data(config, mesh)
    tokenizer = data_building.build_tokenizer(sources, base)
    llama = model_building.model_config(config, base, tokenizer.size)
    _set_up_torch(config, llama)
    data = data_building.build_data(sources, base, tokenizer, llama, mesh, continued)
    model, lora = model_building.build_model(config, base, llama, tokenizer, mesh)
    optimizer = ShardedOptimizer(model.named_parameters(), mesh, config)

    if mesh.is_first:
        in_use = [*sources.data, sources.tokenizer, sources.cache_dir]
        run_directory.start_run(typed_config, overwrite, in_use)
    return Run(
        config=config,
        mesh=mesh,
        out_dir=Path(config.out_dir),
        base=base,
        tokenizer=tokenizer,
        template=data.template,
        train_batches=data.train_batches,
        eval_batches=data.eval_batches,
        model=model,
        lora=lora,
        optimizer=optimizer,
        resume_point=resume_point,
    )


def check_inputs(config: TrainConfig, command: str = "python train.py") -> None:
    """Raise UserError if weights or data are missing. It names the complete command to type, and
    where both are published.
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
