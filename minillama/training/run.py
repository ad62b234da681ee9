"""From settings to the things a run is made of: directory, tokenizer, data, model; and to words about them (`--dry_run`, what is next).

The lower half of the trainer. Everything a user can get wrong about a run is found here, before the first step.
"""

import json
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minillama import comm, hf_config, llama_config
from minillama.checkpoint import hf_format as checkpoints
from minillama.checkpoint import train_state
from minillama.data.batches import BatchPlan, split_documents
from minillama.data.demo import write_demo
from minillama.data.token_cache import open_data
from minillama.data.tokenize import DataOptions
from minillama.data.windows import TrainingWindows
from minillama.device import compute_dtype
from minillama.errors import UserError, read_json
from minillama.llama_config import LlamaConfig
from minillama.lora import WHOLE, LoraConfig, add_lora, load_adapter
from minillama.model import Llama
from minillama.tokenizer import Tokenizer, open_tokenizer
from minillama.train_config import TrainConfig
from minillama.training.dry_run import activation_bytes, estimate, lora_config

EMBEDDED = ("demo", "demo_lora")
LARGEST_REPLICATED = (
    40 * 10**9
)  # bytes of frozen weights that one card can be asked to hold beside its activations
SHAPE_KEYS = ("n_layers", "dim", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size")
# What may differ between the parts of one run without changing its result.
HARMLESS = {
    "out_dir",
    "resume",
    "device",
    "ops",
    "threads",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "per_device_eval_batch_size",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "plot_loss",
    "peak_tflops",
    "cache_dir",
    "workers",
    "gradient_checkpointing",
    "gradient_accumulation_steps",
    "zero_stage",
    "bucket_elements",
}  # the global batch is kept, on any number of ranks


def with_embedded_data(settings: TrainConfig, mesh: comm.Mesh) -> TrainConfig:
    """Replace the names `demo` and `demo_lora` in data and tokenizer by files that the package writes into the run directory."""
    name = next((name for name in (*settings.data, settings.tokenizer) if name in EMBEDDED), None)
    if name is None:
        return settings
    with comm.first_rank_first(mesh):
        data, vocabulary = write_demo(name, Path(settings.out_dir) / "data")
    return replace(
        settings,
        data=tuple(str(data) if part in EMBEDDED else part for part in settings.data),
        tokenizer=str(vocabulary) if settings.tokenizer in EMBEDDED else settings.tokenizer,
        cache_dir=settings.cache_dir or str(data.parent / "cache"),
    )


def check_inputs(settings: TrainConfig, command: str) -> None:
    """Refuse a run that lacks weights or data, with the complete command to type and where both are published."""
    lacking = {}
    if settings.init == "pretrained" and not settings.ckpt:
        lacking["--ckpt LLAMA_DIR"] = (
            "weights: a Hugging Face LLaMA directory, such as huggingface.co/meta-llama/Llama-2-7b-hf "
            "(Meta's own .pth files: convert.py meta)"
        )
    if settings.init == "scratch" and not settings.tokenizer and not settings.ckpt:
        lacking["--tokenizer tokenizer.model"] = (
            "vocabulary: the tokenizer.model of any LLaMA checkpoint"
        )
    if not settings.data:
        lacking["--data alpaca_data.json"] = (
            "instruction data: Stanford Alpaca, alpaca_data.json at github.com/tatsu-lab/stanford_alpaca"
        )
    if lacking:
        raise UserError(
            f"nothing to train {'from' if settings.data else 'on'}; type: {command} {' '.join(lacking)}  "
            f"({'; '.join(lacking.values())})"
        )


def refuse_what_cannot_fit(settings: TrainConfig) -> None:
    """Refuse models whose frozen weights every rank would have to hold whole."""
    weights = (
        estimate(model_config(settings), settings).weights if settings.model or settings.ckpt else 0
    )
    if weights > LARGEST_REPLICATED:
        raise UserError(
            f"the model's weights alone are {weights:,} bytes ({_gb(weights)}) on every rank: data parallelism replicates "
            f"them, and tensor parallelism does not exist here yet; {_gb(LARGEST_REPLICATED)} is the most"
        )


def describe(settings: TrainConfig, world_size: int) -> str:
    """Parameters, bytes per rank and tokens per step; nothing is allocated."""
    config = model_config(settings)
    e = estimate(config, settings, world_size)
    width, recompute = 4 if settings.precision == "fp32" else 2, settings.gradient_checkpointing
    length = settings.max_length or min(config.max_seq_len, 1024)
    rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * world_size
    micro = settings.per_device_train_batch_size * length
    duration = (
        f"{settings.max_steps} steps"
        if settings.max_steps
        else f"{settings.num_train_epochs:g} epochs"
    )
    warmup = (
        f"{settings.warmup_steps} steps"
        if settings.warmup_steps
        else f"{settings.warmup_ratio:.0%}"
    )
    return "\n".join(
        [
            f"model       {config.n_layers} layers, width {config.dim}, {config.n_heads} heads ({config.n_kv_heads} key/value), "
            f"MLP {config.ffn_dim}, vocabulary {config.vocab_size:,}",
            f"parameters  {config.parameter_count():,}; trained: {e.trainable:,} ({e.trainable / config.parameter_count():.2%})",
            f"per rank    weights {_gb(e.weights)} + gradients {_gb(e.gradients)} + optimizer {_gb(e.optimizer)} = {_gb(e.total)}, "
            f"before activations ({settings.precision}, ZeRO stage {settings.zero_stage}, {world_size} rank{'s' * (world_size > 1)})",
            f"activations {_gb(activation_bytes(config, micro, width, recompute))} a micro-batch ({'recomputed' if recompute else 'kept'})",
            f"disk        {_gb(config.parameter_count() * width * (not settings.lora) + e.trainable * 12)} a checkpoint",
            f"a step      {rows} rows of up to {length:,} tokens = up to {rows * length:,} tokens on all ranks",
            f"schedule    {duration}, {settings.lr_scheduler_type} from {settings.learning_rate:g}, warm-up {warmup}, seed {settings.seed}",
        ]
    )


def closing_words(settings: TrainConfig, summary: dict[str, Any]) -> str:
    """What came of the run, and the command to type next."""
    loss = (
        f"loss {summary['last_loss']:.4f}" if summary["last_loss"] is not None else "no finite loss"
    )
    held_out = (
        f", validation loss {summary['eval_loss']:.4f}" if summary["eval_loss"] is not None else ""
    )
    out_dir = Path(settings.out_dir)
    follow = (
        f"python eval.py --task demo --ckpt {out_dir}   or   "
        if out_dir.name.startswith("demo")
        else ""
    )
    return (
        f"{summary['steps']:,} steps, {summary['tokens']:,} tokens, {loss}{held_out}, {summary['seconds']:.0f} s, "
        f"{summary['tokens_per_second']:,.0f} tokens/s per device, peak memory {_gb(summary['peak_memory_bytes'])}\n"
        f"next: {follow}python generate.py --ckpt {out_dir} --chat"
    )


def _gb(count: float | None) -> str:
    return "not told" if count is None else f"{count / 1e9:.2f} GB"


def model_config(settings: TrainConfig, vocab_size: int = 0) -> LlamaConfig:
    """The architecture of a run, from the checkpoint's config.json or, from scratch, from `model` and the shape keys."""
    given = {name: getattr(settings, name) for name in SHAPE_KEYS if getattr(settings, name)}
    if settings.ckpt and settings.init == "pretrained":
        config = hf_config.read_config(checkpoints.find_checkpoint(Path(settings.ckpt)))
        differs = [
            name
            for name in given
            if name not in ("n_layers", "vocab_size") and given[name] != getattr(config, name)
        ]
        if differs:
            raise UserError(
                f"{differs[0]} = {given[differs[0]]}, but {settings.ckpt} has {getattr(config, differs[0])}; leave it out, "
                "or add --init scratch"
            )
        return llama_config.with_layers(config, settings.n_layers) if settings.n_layers else config
    if not settings.model:
        missing = [name for name in ("dim", "n_layers", "n_heads") if name not in given]
        if missing:
            raise UserError(
                f"training from scratch needs a shape: --model 110m, or --{' --'.join(missing)}"
            )
        given = {
            "n_kv_heads": given["n_heads"],
            "ffn_dim": llama_config.ffn_width(given["dim"], 32),
        } | given
    config = hf_config.published(
        settings.model or "1.1b"
    )  # a shape of one's own has its vocabulary, context and epsilon
    if given.keys() & {"dim", "n_heads"}:
        C, H = given.get("dim", config.dim), given.get("n_heads", config.n_heads)
        if C % H:
            raise UserError(f"dim = {C} is not a multiple of n_heads = {H}")
        given["head_dim"] = C // H
    given = {"vocab_size": vocab_size or config.vocab_size} | given
    return replace(
        config,
        **given,
        max_seq_len=settings.context or config.max_seq_len,
        initializer_range=settings.initializer_range,
    )


def recompute_activations(layers: nn.ModuleList) -> None:
    """Make layers of a finished model keep their input (T, C) alone and compute the rest again in backward (Chen et al. 2016): one more
    forward, about a third of a step's time, for many times the memory. Gradients are the same to the bit; parameters keep their names."""
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def build_tokenizer(settings: TrainConfig) -> Tokenizer:
    return open_tokenizer(settings.tokenizer or checkpoints.find_checkpoint(Path(settings.ckpt)))


def build_model(
    settings: TrainConfig, tokenizer: Tokenizer, mesh: comm.Mesh
) -> tuple[Llama, LoraConfig | None]:
    """The model on its device, with adapters where asked for; and what those are."""
    dtype, warning = compute_dtype(settings.precision, mesh.device)
    if warning:
        mesh.print(f"warning: {warning}")
    config, generator = (
        model_config(settings, tokenizer.size),
        torch.Generator().manual_seed(settings.seed),
    )
    if settings.ckpt and settings.init == "pretrained":
        keeps_rows = settings.lora and not set(WHOLE) <= set(settings.modules_to_save)
        if keeps_rows and tokenizer.size > config.vocab_size:
            raise UserError(
                f"{tokenizer.path} has {tokenizer.size} pieces, more than the checkpoint's embedding has rows; the new rows "
                "would never be trained: add --modules_to_save embed_tokens,lm_head"
            )
        model = checkpoints.load_model(
            checkpoints.find_checkpoint(Path(settings.ckpt)),
            dtype,
            settings.n_layers,
            tokenizer.size,
        )
    else:
        if config.vocab_size < tokenizer.size:
            raise UserError(
                f"vocab_size = {config.vocab_size} is below the tokenizer's {tokenizer.size} pieces"
            )
        config = replace(
            config,
            bos_id=tokenizer.bos_id or 0,
            eos_ids=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
        )
        model = checkpoints.empty_model(config, torch.float32).initialise(generator).to(dtype)
    lora = None
    if settings.lora and settings.adapter:
        lora = load_adapter(model, Path(settings.adapter), settings.lora_dropout)
    elif settings.lora:
        lora = lora_config(settings)
        add_lora(model, lora, generator)
    if settings.gradient_checkpointing:
        recompute_activations(model.model.layers)
    return model.to(mesh.device).train(), lora


def prepare_directory(
    settings: TrainConfig, mesh: comm.Mesh, overwrite: bool
) -> tuple[Path | None, dict[str, Any] | None]:
    """A run directory belongs to one run: it is continued, or refused, or emptied on request; never mixed. Returns
    (checkpoint to resume or None, summary of a finished run or None); train_config.json is written for a run to be made."""
    out_dir = Path(settings.out_dir)
    with comm.first_rank_first(mesh):
        if (
            out_dir.is_dir()
            and any(out_dir.iterdir())
            and not (out_dir / "train_config.json").is_file()
        ):
            raise UserError(
                f"{out_dir}: holds files that no run of ours made, and is left alone; choose another --out_dir"
            )
        if overwrite and mesh.is_first:
            shutil.rmtree(out_dir, ignore_errors=True)
        _refuse_other_settings(settings, out_dir)
        if settings.resume == "auto" and (out_dir / "summary.json").is_file():
            return None, read_json(out_dir / "summary.json")
        out_dir.mkdir(parents=True, exist_ok=True)
        if mesh.is_first:
            checkpoints.write_json(
                out_dir / "train_config.json", asdict(settings)
            )  # which --config takes back
    if settings.resume != "auto":
        return None if settings.resume == "none" else Path(settings.resume), None
    found = train_state.newest_intact(out_dir, mesh.print) if mesh.is_first else None
    return comm.gather_objects(mesh, found)[0], None


def _refuse_other_settings(settings: TrainConfig, out_dir: Path) -> None:
    if not (out_dir / "metrics.jsonl").is_file():
        return  # it never came to a first step: a mistake mended, nothing to protect
    before, now = read_json(out_dir / "train_config.json"), json.loads(json.dumps(asdict(settings)))
    changed = [
        name
        for name in now
        if name not in HARMLESS and name in before and before[name] != now[name]
    ]
    if changed:
        shown = ", ".join(f"{name} was {before[name]!r}, is {now[name]!r}" for name in changed)
        raise UserError(
            f"{out_dir}: holds a run with other settings: {shown}; choose another --out_dir, or --overwrite_output_dir"
        )


def with_global_batch(settings: TrainConfig, mesh: comm.Mesh, rows_per_step: int) -> TrainConfig:
    """The settings with the accumulation that keeps a run's global batch on this number of ranks, or a refusal by name."""
    accumulation, rest = divmod(rows_per_step, settings.per_device_train_batch_size * mesh.size)
    if rest:
        raise UserError(
            f"the run's global batch is {rows_per_step} rows, which {mesh.size} ranks with "
            f"{settings.per_device_train_batch_size} rows at a time cannot make; use another number of ranks"
        )
    if accumulation != settings.gradient_accumulation_steps:
        mesh.print(
            f"global batch kept at {rows_per_step} rows: gradient_accumulation_steps is {accumulation} on {mesh.size} ranks"
        )
    return replace(settings, gradient_accumulation_steps=accumulation)


def build_plans(
    settings: TrainConfig, tokenizer: Tokenizer, config: LlamaConfig, mesh: comm.Mesh
) -> tuple[BatchPlan, BatchPlan | None, str]:
    """The training plan, the evaluation plan (None where nothing is held out), and the template of the data."""
    max_length = settings.max_length or min(config.max_seq_len, 1024)
    if max_length > config.max_seq_len:
        raise UserError(
            f"max_length = {max_length} exceeds the model's context of {config.max_seq_len}"
        )
    about = (
        checkpoints.read_about(checkpoints.find_checkpoint(Path(settings.ckpt)))
        if settings.ckpt
        else {}
    )
    template = settings.template or about.get("template") or "alpaca"
    options = DataOptions(
        data_format=settings.data_format,
        template=settings.template,
        default_template=template,
        append_eod=settings.append_eod,
        skip_bad_records=settings.skip_bad_records,
        dataset_dir=settings.dataset_dir,
        cache_dir=settings.cache_dir,
        workers=settings.workers,
        quiet=not mesh.is_first,
    )
    with comm.first_rank_first(mesh):
        dataset = open_data(settings.data, tokenizer, options)
        held_out = open_data(settings.eval_data, tokenizer, options) if settings.eval_data else None
    documents, evaluation = None, TrainingWindows(held_out, max_length) if held_out else None
    if held_out is None and settings.validation_split:
        documents, reserved = split_documents(
            len(dataset), settings.validation_split, settings.seed
        )
        evaluation = TrainingWindows(dataset, max_length, reserved)
    windows = TrainingWindows(dataset, max_length, documents)
    micro = settings.per_device_train_batch_size
    plan = BatchPlan(
        windows,
        rows_per_step=micro * settings.gradient_accumulation_steps * mesh.size,
        rows_per_micro_batch=micro,
        seed=settings.seed,
        packing=settings.packing,
        epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
    )
    mesh.print(f"data: {windows.summary()}")
    micro = settings.per_device_eval_batch_size
    eval_plan = (
        BatchPlan(
            evaluation,
            rows_per_step=micro * mesh.size,
            rows_per_micro_batch=micro,
            seed=0,
            packing=settings.packing,
            shuffle=False,
        )
        if evaluation
        else None
    )
    return plan, eval_plan, dataset.meta.get("template") or template
