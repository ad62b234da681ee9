"""Hugging Face's layout to Megatron's (AscendSpeed, Megatron-LM, DeepSpeed), back, and cut anew.

    hf_to_megatron     whole tensors ─▶ files of a grid TP × PP      megatron_writer.py
    megatron_to_hf     files of any grid ─▶ whole tensors            megatron_reader.py
    reshard            files of one grid ─▶ files of another one

Megatron's files do not say how many heads a model has, nor its rotary base. So `hf_to_megatron`
puts config.json and the tokenizer beside the weights, where Megatron passes them over. For the
files of others, `config` names the model that they came from.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from minillama.checkpoint.hf_reader import EMBEDDING, HEAD, check_names, open_weights
from minillama.checkpoint.hf_writer import write_configs
from minillama.conversion.megatron_adapter import write_megatron_adapter
from minillama.conversion.megatron_layout import Heads, LazyModel, MegatronOptions, heads_of
from minillama.conversion.megatron_reader import (
    MegatronCheckpoint,
    MegatronFiles,
    find_files,
    read_megatron,
)
from minillama.conversion.megatron_writer import FIRST_GATE, write_megatron
from minillama.conversion.writer import (
    RELEASE,
    Conversion,
    LazyTensor,
    LazyTensors,
    Output,
    tokenizer_notes,
    write_checkpoint,
    write_companions,
)
from minillama.errors import UserError
from minillama.hf_config import published, read_config
from minillama.llama_config import LlamaConfig
from minillama.tensor_files import TensorRef

Numbers = Mapping[str, int]  # those of n_layers, dim, n_heads, n_kv_heads that a command names
UNKNOWN_HEADS = (
    "no config.json beside the files, and they do not hold the number of heads; name the model "
    "that they came from with --config: a config.json, its directory, or a size such as 7b"
)


@dataclass(frozen=True)
class Origin:
    """The model that a Megatron checkpoint came from."""

    config: LlamaConfig
    directory: Path | None  # that has its config.json; None: a published size


def hf_to_megatron(
    source: Path,
    output: Output,
    options: MegatronOptions,
    bias: bool = False,
    numbers: Numbers | None = None,
) -> Conversion:
    """Convert the directory `source` from Hugging Face's layout to Megatron's.

    bias: whether the model has biases. numbers: to compare with config.json.
    Raises UserError for a difference, and for a model that cannot be cut like this.
    """
    config = read_config(source)
    _compare_numbers(config, numbers, source)
    tensors = open_weights(source)
    check_names(config, tensors, source)
    model = LazyModel(tensors, config.n_layers, heads_of(config))
    if bias != bool(model.biases):
        remedy = "leave --bias out" if bias else "add --bias"
        raise UserError(f"{source}: holds {len(model.biases)} biases; {remedy}")
    dtype = output.dtype or tensors[EMBEDDING].dtype

    def write_beside(directory: Path) -> None:
        write_companions(directory, source, config, dtype, [source])

    notes = tokenizer_notes([source])
    return write_megatron(output, [source], model, options, write_beside, notes)


def megatron_to_hf(
    source: Path,
    output: Output,
    config: Path | str = "",
    vocab_size: int = 0,
    lora_alpha: float = 0.0,
) -> Conversion:
    """Convert a Megatron checkpoint to a Hugging Face directory, or a LoRA run's to PEFT's.

    Args:
        config: a config.json, its directory, or a published size; empty: the one beside the files.
        vocab_size: rows to keep of a padded vocabulary; 0: as config.json says.
        lora_alpha: of a LoRA run; 0: as the settings of the run say.
    """
    files = find_files(source)
    origin = _find_origin(files, config)
    if origin is None:
        raise UserError(f"{source}: {UNKNOWN_HEADS}")
    checkpoint = read_megatron(files, heads_of(origin.config))
    inputs = _inputs_of(files, origin)
    rows = vocab_size or _tokens_of(checkpoint, files, origin.config)
    tensors = _crop_vocabulary(checkpoint.model.tensors, rows)
    if checkpoint.is_lora:
        base = str(origin.directory or "") if config else ""
        alpha = lora_alpha or float(checkpoint.arguments.get("lora_alpha") or 0)
        return write_megatron_adapter(output, inputs, tensors, origin.config, alpha, base)
    model_config = _fit_config(origin.config, tensors)
    if model_config.tie_embeddings:
        tensors.pop(HEAD, None)
    check_names(model_config, tensors, files.folder)
    dtype = output.dtype or tensors[EMBEDDING].dtype
    write_beside = _companions_of(origin.directory, model_config, dtype)
    return write_checkpoint(output, inputs, tensors, write_beside, notes=_notes(files))


def reshard(
    source: Path,
    output: Output,
    options: MegatronOptions,
    config: Path | str = "",
    vocab_size: int = 0,
    numbers: Numbers | None = None,
) -> Conversion:
    """Cut a Megatron checkpoint anew, for another grid.

    A merged MLP and DeepSpeed's names stay, or are asked for by the options.

    Args:
        config, vocab_size: as in `megatron_to_hf`; without a config.json, 0 keeps all rows.
        numbers: to compare with the model. Its heads are enough if there is no config.json.
    """
    files = find_files(source)
    origin = _find_origin(files, config)
    numbers = numbers or {}
    if origin is not None:
        heads = heads_of(origin.config)
    elif "n_heads" in numbers:
        heads = Heads(numbers["n_heads"], numbers.get("n_kv_heads", numbers["n_heads"]))
    else:
        raise UserError(f"{source}: {UNKNOWN_HEADS}")
    checkpoint = read_megatron(files, heads)
    if checkpoint.is_lora:
        raise UserError(f"{source}: holds an adapter; from-megatron makes a PEFT directory of it")
    rows = vocab_size
    if origin is not None and not rows:
        rows = _tokens_of(checkpoint, files, origin.config)
    tensors = _crop_vocabulary(checkpoint.model.tensors, rows)
    model = replace(checkpoint.model, tensors=tensors)
    if origin is None:
        model_config = _config_of_shapes(model, files)
    else:
        model_config = replace(origin.config, vocab_size=tensors[EMBEDDING].shape[0])
    check_names(model_config, tensors, files.folder)
    _compare_numbers(model_config, numbers, source)
    dtype = output.dtype or tensors[EMBEDDING].dtype
    write_beside = _companions_of(origin.directory, model_config, dtype) if origin else None
    options = replace(
        options,
        deepspeed=options.deepspeed or files.grid.deepspeed,
        merge_mlp=options.merge_mlp or checkpoint.is_merged,
    )
    inputs = _inputs_of(files, origin)
    return write_megatron(output, inputs, model, options, write_beside, _notes(files))


def check_source_grid(source: Path, tensor_parallel: int, pipeline_parallel: int) -> None:
    """Raise UserError unless the files are cut as a command says; 0: it does not say."""
    grid = find_files(source).grid
    stated = {
        "tensor": (tensor_parallel, grid.tensor_parallel),
        "pipeline": (pipeline_parallel, grid.pipeline_parallel),
    }
    for name, (value, actual) in stated.items():
        if value not in (0, actual):
            raise UserError(
                f"{source}: its folders say that {name} parallelism is {actual}, the command says "
                f"{value}; leave --src_{name}_parallel out"
            )


def _find_origin(files: MegatronFiles, config: Path | str) -> Origin | None:
    if config:
        path = Path(config)
        directory = path if path.is_dir() else path.parent
        return Origin(published(str(config)), directory if path.exists() else None)
    root = files.folder.resolve().parent
    if (root / "config.json").is_file():
        return Origin(read_config(root), root)
    return None


def _inputs_of(files: MegatronFiles, origin: Origin | None) -> list[Path]:
    if origin is None or origin.directory is None:
        return [files.folder]
    return [files.folder, origin.directory]


def _compare_numbers(config: LlamaConfig, numbers: Numbers | None, source: Path) -> None:
    for name, value in (numbers or {}).items():
        actual = getattr(config, name)
        if value != actual:
            raise UserError(
                f"{source}: {name} = {actual}, the command says {value}; leave its flag out"
            )


def _tokens_of(checkpoint: MegatronCheckpoint, files: MegatronFiles, config: LlamaConfig) -> int:
    """Return the rows that are not padding, by config.json, if that is likely."""
    embedding = checkpoint.model.tensors.get(EMBEDDING)
    if embedding is None:  # of an adapter
        return config.vocab_size
    rows = embedding.shape[0]
    largest_padding = MegatronOptions.vocab_multiple * files.grid.tensor_parallel
    if rows - config.vocab_size >= largest_padding:
        raise UserError(
            f"{files.folder}: {rows} rows of vocabulary, config.json says {config.vocab_size}; "
            "that is more than padding, so say how many are tokens with --vocab_size"
        )
    return config.vocab_size


def _crop_vocabulary(tensors: LazyTensors, rows: int) -> dict[str, TensorRef | LazyTensor]:
    """Keep the first rows of embedding and head; 0: all."""
    cropped = dict(tensors)
    for name in (EMBEDDING, HEAD):
        tensor = tensors.get(name)
        if tensor is None or rows in (0, tensor.shape[0]):
            continue
        if rows > tensor.shape[0]:
            raise UserError(f"{name} has {tensor.shape[0]} rows; it cannot be cropped to {rows}")
        cropped[name] = _crop_lazily(tensor, rows)
    return cropped


def _crop_lazily(tensor: TensorRef | LazyTensor, rows: int) -> LazyTensor:
    def read() -> Tensor:
        return tensor.read()[:rows]

    return LazyTensor(tensor.dtype, (rows, *tensor.shape[1:]), read)


def _fit_config(config: LlamaConfig, tensors: LazyTensors) -> LlamaConfig:
    """Return the config with the vocabulary of the tensors, tied if their head is.

    A tied head is in the files as a copy. Training may have made it another one.
    """
    is_tied = HEAD not in tensors
    if config.tie_embeddings and not is_tied:
        is_tied = torch.equal(tensors[HEAD].read(), tensors[EMBEDDING].read())
    vocab_size = tensors[EMBEDDING].shape[0] if EMBEDDING in tensors else config.vocab_size
    return replace(config, vocab_size=vocab_size, tie_embeddings=is_tied)


def _config_of_shapes(model: LazyModel, files: MegatronFiles) -> LlamaConfig:
    """Return a config for `check_names`. Its norm_eps and rotary base mean nothing."""
    for name in (EMBEDDING, FIRST_GATE):
        if name not in model.tensors:
            raise UserError(f"{files.folder}: holds no {name}")
    rows, dim = model.tensors[EMBEDDING].shape
    return LlamaConfig(
        dim=dim,
        n_layers=model.n_layers,
        n_heads=model.heads.n_heads,
        n_kv_heads=model.heads.n_kv_heads,
        head_dim=dim // model.heads.n_heads,
        ffn_dim=model.tensors[FIRST_GATE].shape[0],
        vocab_size=rows,
        max_seq_len=1,
        norm_eps=1.0,
        rope_theta=1.0,
        attention_bias=bool(model.biases),
    )


def _companions_of(
    directory: Path | None, config: LlamaConfig, dtype: torch.dtype
) -> Callable[[Path], None]:
    """Return what writes config.json and, if `directory` has them, tokenizer and template."""

    def write(target: Path) -> None:
        if directory is None:
            write_configs(target, config, dtype)
        else:
            write_companions(target, directory, config, dtype, [directory])

    return write


def _notes(files: MegatronFiles) -> list[str]:
    if files.folder.name == RELEASE:
        return []
    return [f"note: of {files.folder.name}, a step of a training run, only the weights are taken"]
