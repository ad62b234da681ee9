"""The architecture of a run: a checkpoint's config.json, a published size, or the shape keys."""

from dataclasses import replace
from pathlib import Path

from minillama import hf_config
from minillama.checkpoint.run_directory import find_checkpoint
from minillama.errors import UserError
from minillama.llama_config import LlamaConfig, ffn_width, with_layers
from minillama.parallel.tensor import refuse_uncuttable
from minillama.train_config import TrainConfig

SHAPE_KEYS = ("n_layers", "dim", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size")
OTHER_SHAPES = "1.1b"  # its context and epsilon are those of a shape that was never published


def find_base(config: TrainConfig) -> Path | None:
    """The directory of the checkpoint that a run starts from, or None."""
    return find_checkpoint(Path(config.ckpt)) if config.ckpt else None


def find_adapter(config: TrainConfig) -> Path | None:
    """The directory of the adapter that a run starts from, or None. A run stands for its final/."""
    if not config.adapter:
        return None
    directory = Path(config.adapter)
    is_adapter = (directory / "adapter_config.json").is_file()
    return directory if is_adapter else find_checkpoint(directory)


def pretrained(config: TrainConfig, base: Path | None) -> Path | None:
    """The checkpoint that the weights come from; None: they are random."""
    return base if config.init == "pretrained" else None


def model_config(config: TrainConfig, base: Path | None, vocab_size: int = 0) -> LlamaConfig:
    """The architecture that a run trains.

    base: the checkpoint's directory.
    vocab_size: of a model from scratch; 0: as published.
    Raises UserError if the shape keys contradict the checkpoint, or do not make a shape, or if
    tensor ranks cannot divide it.
    """
    llama = _find_shape(config, base, vocab_size)
    refuse_uncuttable(llama, config.tensor_parallel)
    return llama


def _find_shape(config: TrainConfig, base: Path | None, vocab_size: int) -> LlamaConfig:
    """The checkpoint's architecture, or that of the shape keys."""
    keys = {name: getattr(config, name) for name in SHAPE_KEYS}
    keys = {name: value for name, value in keys.items() if value}
    weights = pretrained(config, base)
    if weights is not None:
        llama = hf_config.read_config(weights)
        _refuse_other_shape(config, llama, keys)
        return with_layers(llama, config.n_layers) if config.n_layers else llama
    if not config.model:
        keys = _complete_shape(keys)
    llama = hf_config.published(config.model or OTHER_SHAPES)
    if "dim" in keys or "n_heads" in keys:
        keys["head_dim"] = _head_dim(keys.get("dim", llama.dim), keys.get("n_heads", llama.n_heads))
    keys.setdefault("vocab_size", vocab_size or llama.vocab_size)
    return replace(
        llama,
        **keys,
        max_seq_len=config.context or llama.max_seq_len,
        initializer_range=config.initializer_range,
    )


def _refuse_other_shape(config: TrainConfig, llama: LlamaConfig, keys: dict[str, int]) -> None:
    """Raise UserError if a shape key differs from the checkpoint; it may be cut."""
    for name, value in keys.items():
        actual = getattr(llama, name)
        if value != actual and name != "n_layers":
            raise UserError(
                f"{name} = {value}, but {config.ckpt} has {actual}; leave it out, "
                "or add --init scratch"
            )
    if config.context not in (0, llama.max_seq_len):
        raise UserError(
            f"context = {config.context}, but {config.ckpt} has {llama.max_seq_len}; leave it out "
            "(max_length is the length of a row), or add --init scratch"
        )


def _complete_shape(keys: dict[str, int]) -> dict[str, int]:
    """Add LLaMA's proportions for the shape keys that were left out."""
    missing = [name for name in ("dim", "n_layers", "n_heads") if name not in keys]
    if missing:
        flags = " --".join(missing)
        raise UserError(f"training from scratch needs a shape: --model 110m, or --{flags}")
    defaults = {"n_kv_heads": keys["n_heads"], "ffn_dim": ffn_width(keys["dim"], 32)}
    return defaults | keys


def _head_dim(dim: int, n_heads: int) -> int:
    if dim % n_heads:
        raise UserError(f"dim = {dim} is not a multiple of n_heads = {n_heads}")
    return dim // n_heads
