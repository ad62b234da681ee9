"""Writing a model directory that transformers opens as it is.

    config.json  generation_config.json  tokenizer files
    model.safetensors                    or, above a size,
    model-00001-of-00003.safetensors …   with model.safetensors.index.json, which says what is where

Tensors come one at a time, so the weights are never in memory twice.
"""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillama.checkpoint.tokenizer_files import copy_tokenizer
from minillama.comm import Mesh
from minillama.files import write_json
from minillama.hf_config import to_hf
from minillama.llama_config import LlamaConfig
from minillama.model import Llama
from minillama.output_directory import GB
from minillama.parallel.whole import write_joined
from minillama.tensor_writers import TensorSpecs, safetensors_writer, torch_writer
from minillama.tokenizer import Tokenizer


def save_model(
    model: Llama,
    directory: Path,
    tokenizer: Tokenizer | None = None,
    about: dict[str, Any] | None = None,
    mesh: Mesh | None = None,
    stages: Mesh | None = None,
) -> None:
    """Write a model directory. A tied head is written once, under the embedding's name.

    about: the content of minillama.json.
    mesh, stages: lines of tensor ranks and pipeline stages that have the parts of the model. Each
    of them calls this, and the first one writes the whole.
    """

    def write(specs: TensorSpecs, tensors: Iterator[tuple[str, Tensor]]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        write_weights(directory, tensors, specs)
        write_configs(directory, model.config, model.model.embed_tokens.weight.dtype, tokenizer)
        if about is not None:
            write_json(directory / "minillama.json", about)

    write_joined(dict(model.named_parameters()), mesh or Mesh(), write, stages)


def write_weights(
    directory: Path,
    tensors: Iterator[tuple[str, Tensor]],
    specs: TensorSpecs,
    max_shard_bytes: int = 5 * GB,
    bin: bool = False,
) -> None:
    """Write tensors, in the order of `specs`, as one file, or as shards with their index.

    bin: as pytorch_model.bin in place of model.safetensors.
    """
    writer = torch_writer if bin else safetensors_writer
    stem = "pytorch_model" if bin else "model"
    suffix = ".bin" if bin else ".safetensors"
    sizes = {name: prod(shape) * dtype.itemsize for name, (dtype, shape) in specs.items()}
    shards = split_into_shards(sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        place = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"{stem}{place}{suffix}"
        with writer(directory / file, {name: specs[name] for name in names}) as append:
            for _ in names:
                append(*next(tensors))  # no name keeps this tensor while the next one is read
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        metadata = {"total_size": sum(sizes.values())}
        index = {"metadata": metadata, "weight_map": weight_map}
        write_json(directory / f"{stem}{suffix}.index.json", index)


def split_into_shards(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Cut a list of tensors, in order, where a shard would exceed `max_bytes`.

    A tensor larger than that has a shard of its own. Sizes are in bytes, by name.
    """
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, size in sizes.items():
        if shards[-1] and shard_bytes + size > max_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += size
    return shards


def write_configs(
    directory: Path, config: LlamaConfig, dtype: torch.dtype, tokenizer: Tokenizer | None = None
) -> None:
    """Write what a directory needs beside the weights: configs and the tokenizer's files."""
    content = to_hf(config, str(dtype).removeprefix("torch."))
    write_json(directory / "config.json", content)
    token_ids = {key: content[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(directory / "generation_config.json", token_ids)
    if tokenizer is not None:
        copy_tokenizer(tokenizer.path, directory)
