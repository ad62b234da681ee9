"""What a run would need, in words: `--dry_run`, the refusal of what cannot be, and what to type afterwards."""

from pathlib import Path
from typing import Any

from minillama import building
from minillama.config import Settings
from minillama.errors import UserError
from minillama.estimate import activation_bytes, estimate

LARGEST_REPLICATED = 40 * 10**9  # bytes of frozen weights that one card can be asked to hold beside its activations


def describe(settings: Settings, world_size: int) -> str:
    """Parameters, bytes per rank and tokens per step; nothing is allocated."""
    config = building.model_config(settings)
    e = estimate(config, settings, world_size)
    width, recompute = 4 if settings.precision == "fp32" else 2, settings.gradient_checkpointing
    length = settings.max_length or min(config.max_seq_len, 1024)
    rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * world_size
    micro = settings.per_device_train_batch_size * length
    return "\n".join([
        f"model       {config.n_layers} layers, width {config.dim}, {config.n_heads} heads ({config.n_kv_heads} key/value), "
        f"MLP {config.ffn_dim}, vocabulary {config.vocab_size:,}",
        f"parameters  {config.parameter_count():,}; trained: {e.trainable:,} ({e.trainable / config.parameter_count():.2%})",
        f"per rank    weights {_gb(e.weights)} + gradients {_gb(e.gradients)} + optimizer {_gb(e.optimizer)} = {_gb(e.total)}, "
        f"before activations ({settings.precision}, ZeRO stage {settings.zero_stage}, {world_size} rank{'s' * (world_size > 1)})",
        f"activations {_gb(activation_bytes(config, micro, width, recompute))} a micro-batch ({'recomputed' if recompute else 'kept'})",
        f"disk        {_gb(config.parameter_count() * width * (not settings.lora) + e.trainable * 12)} a checkpoint",
        f"a step      {rows} rows of up to {length:,} tokens = up to {rows * length:,} tokens on all ranks",
        f"schedule    {_schedule(settings)}",
    ])


def _schedule(settings: Settings) -> str:
    length = f"{settings.max_steps} steps" if settings.max_steps else f"{settings.num_train_epochs:g} epochs"
    warmup = f"{settings.warmup_steps} steps" if settings.warmup_steps else f"{settings.warmup_ratio:.0%}"
    return f"{length}, {settings.lr_scheduler_type} from {settings.learning_rate:g}, warm-up {warmup}, seed {settings.seed}"


def refuse_what_cannot_fit(settings: Settings) -> None:
    """Refuse models whose frozen weights every rank would have to hold whole."""
    weights = estimate(building.model_config(settings), settings).weights if settings.model or settings.ckpt else 0
    if weights > LARGEST_REPLICATED:
        raise UserError(f"the model's weights alone are {weights:,} bytes ({_gb(weights)}) on every rank: data parallelism replicates "
                        f"them, and tensor parallelism does not exist here yet; {_gb(LARGEST_REPLICATED)} is the most")


def closing_words(settings: Settings, summary: dict[str, Any]) -> str:
    """What came of the run, and the command to type next."""
    loss = f"loss {summary['last_loss']:.4f}" if summary["last_loss"] is not None else "no finite loss"
    held_out = f", validation loss {summary['eval_loss']:.4f}" if summary["eval_loss"] is not None else ""
    out_dir = Path(settings.out_dir)
    follow = f"python eval.py --task demo --ckpt {out_dir}   or   " if out_dir.name.startswith("demo") else ""
    return (f"{summary['steps']:,} steps, {summary['tokens']:,} tokens, {loss}{held_out}, {summary['seconds']:.0f} s, "
            f"{summary['tokens_per_second']:,.0f} tokens/s per device, peak memory {_gb(summary['peak_memory_bytes'])}\n"
            f"next: {follow}python generate.py --ckpt {out_dir} --chat")


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
