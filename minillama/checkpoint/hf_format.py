"""A checkpoint is a Hugging Face LLaMA directory: config.json, model*.safetensors (and index), tokenizer files.

Older ones hold pytorch_model*.bin in place of the safetensors, and load alike. Reading is a loop over tensors: check the name and
shape, copy, forget. Names that the model needs and the files lack, or that nobody wants, are errors; nothing is filled in silently.
"""

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minillama.errors import UserError, listed, read_json
from minillama.hf_config import read_config, to_hf
from minillama.llama_config import LlamaConfig, with_layers
from minillama.model import Llama
from minillama.tensor_files import (
    POSITIONS,
    TensorRef,
    read_tensors,
)
from minillama.tensor_writers import TensorSpecs, safetensors_writer, specs_of, torch_writer
from minillama.tokenizer import Tokenizer

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GB = 10**9


def open_weights(directory: Path) -> dict[str, TensorRef]:
    """Every tensor of a checkpoint directory, by name, from headers alone; model*.safetensors before pytorch_model*.bin.
    Raises UserError for missing or unreadable files, all of them in one message."""
    if not directory.is_dir():
        raise UserError(
            f"{directory}: no such directory; a checkpoint is a directory with config.json and model*.safetensors"
        )
    found = open_files(_weight_files(directory), "the index promises; download it again")
    return {name: entry for entries in found for name, entry in entries.items()}


def open_files(
    files: Mapping[Path, Collection[str]], promise: str, alike: bool = False
) -> list[dict[str, TensorRef]]:
    """The tensors in each of `files`, by name, without rotary buffers. UserError lists all files that are not there, cannot be read,
    lack one of their names (which `promise`) or, unless files are `alike` (slices of the same tensors), hold what another holds too."""
    found, problems, places = [], [], {}
    for path, names in files.items():
        try:
            entries = read_tensors(path)
        except UserError as error:
            problems.append(str(error))
            continue
        found.append({name: entry for name, entry in entries.items() if not POSITIONS.search(name)})
        problems += [
            f"{path}: lacks {name}, which {promise}" for name in names if name not in entries
        ]
        problems += [
            f"{path}: {name} is in {places[name]} too"
            for name in entries
            if name in places and not alike
        ]
        places |= dict.fromkeys(entries, path.name)
    if problems:
        raise UserError(listed(problems, 8))
    return found


def _weight_files(directory: Path) -> dict[Path, list[str]]:
    """The files that hold the weights, and the tensors an index promises in each."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{single}.index.json"
        if index.is_file():
            return _read_index(index)
        if (directory / single).is_file():
            return {directory / single: []}
    if shards := [
        *directory.glob("model-*-of-*.safetensors"),
        *directory.glob("pytorch_model-*-of-*.bin"),
    ]:
        raise UserError(
            f"{directory}: holds shards ({shards[0].name}, …) without their index; download the *.index.json too"
        )
    if list(directory.glob("consolidated.*.pth")):
        raise UserError(
            f"{directory}: Meta's; convert it first: python convert.py meta --input {directory} --output {directory.name}-hf"
        )
    if (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory}: a LoRA adapter, not a whole model; name its base with --base DIR"
        )
    raise UserError(f"{directory}: holds no model*.safetensors and no pytorch_model*.bin")


def _read_index(index: Path) -> dict[Path, list[str]]:
    files: dict[Path, list[str]] = {}
    for tensor, name in read_json(index, keys={"weight_map": dict}, what="a weight index")[
        "weight_map"
    ].items():
        if Path(str(name)).name != name:
            raise UserError(
                f"{index}: names the file {name!r}; only plain file names inside the directory are read"
            )
        files.setdefault(index.with_name(name), []).append(tensor)
    return dict(sorted(files.items()))


def load_model(
    directory: Path, dtype: torch.dtype = torch.float32, n_layers: int = 0, vocab_size: int = 0
) -> Llama:
    """Read a checkpoint as a `Llama` of `dtype` on the host, one tensor at a time.
    n_layers: only the first N (0: all). vocab_size: grow the embeddings to this many rows; new rows are the mean of the old.
    Raises UserError for any difference between the files and what config.json describes."""
    config, entries = read_config(directory), open_weights(directory)
    check_names(config, entries, directory)
    config = with_layers(config, n_layers) if n_layers else config
    model = empty_model(replace(config, vocab_size=max(vocab_size, config.vocab_size)), dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = entries[name].read()
            parameter[: len(tensor)].copy_(tensor)
            if len(tensor) < len(parameter):
                parameter[len(tensor) :] = tensor.float().mean(0).to(dtype)
    return model


def empty_model(config: LlamaConfig, dtype: torch.dtype) -> Llama:
    """A `Llama` with storage and no values: made without storage first, so nothing is allocated twice."""
    with torch.device("meta"):
        model = Llama(config)
    for module in (
        model.modules()
    ):  # what `to_empty` does, but for the half second in which that loads torch's compiler
        for name, parameter in module.named_parameters(recurse=False):
            setattr(
                module, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device="cpu"))
            )
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def check_names(config: LlamaConfig, entries: dict[str, TensorRef], where: Path) -> None:
    """Compare the tensors at hand with those `config` describes; UserError lists every difference. A tied head may be there."""
    wanted = config.parameter_shapes()
    problems = [f"missing {name}" for name in wanted if name not in entries]
    problems += [
        f"unexpected {name}"
        for name in entries
        if name not in wanted and not (config.tie_embeddings and name == HEAD)
    ]
    problems += [
        f"{name} is {entries[name].shape}, config.json says {shape}"
        for name, shape in wanted.items()
        if name in entries and entries[name].shape != shape
    ]
    if problems:
        raise UserError(f"{where}: the weights do not fit config.json: {listed(problems)}")


def save_model(
    model: Llama,
    directory: Path,
    tokenizer: Tokenizer | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Write a Hugging Face directory that transformers opens as it is; a tied head once, under the embedding's name.
    about: goes into minillama.json."""
    directory.mkdir(parents=True, exist_ok=True)
    named = dict(model.named_parameters())
    write_weights(directory, iter(named.items()), specs_of(named))
    write_configs(directory, model.config, next(iter(named.values())).dtype, tokenizer)
    if about is not None:
        write_json(directory / "minillama.json", about)


def write_weights(
    directory: Path,
    tensors: Iterator[tuple[str, Tensor]],
    plan: TensorSpecs,
    max_shard_bytes: int = 5 * GB,
    bin: bool = False,
) -> None:
    """Write tensors, in the order of `plan`, as one model.safetensors, or as shards with their index. bin: as pytorch_model.bin."""
    sizes = {name: prod(shape) * dtype.itemsize for name, (dtype, shape) in plan.items()}
    shards, room = [[]], max_shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    writer, stem, suffix = (
        (torch_writer, "pytorch_model", ".bin")
        if bin
        else (safetensors_writer, "model", ".safetensors")
    )
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = stem + (f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else "") + suffix
        with writer(directory / file, {name: plan[name] for name in names}) as append:
            for _ in names:
                append(*next(tensors))
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        metadata = {"total_size": sum(sizes.values())}
        write_json(
            directory / f"{stem}{suffix}.index.json",
            {"metadata": metadata, "weight_map": weight_map},
        )


def write_configs(
    directory: Path, config: LlamaConfig, dtype: torch.dtype, tokenizer: Tokenizer | None = None
) -> None:
    """config.json, generation_config.json and the tokenizer's files: what a directory of weights needs beside them."""
    written = to_hf(config, str(dtype).removeprefix("torch."))
    write_json(directory / "config.json", written)
    write_json(
        directory / "generation_config.json",
        {key: written[key] for key in ("bos_token_id", "eos_token_id")},
    )
    if tokenizer is not None:
        copy_tokenizer(tokenizer.path, directory)


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy a tokenizer (its file, or the directory that holds it) and what describes it; a bare tokenizer.model is LLaMA's.
    A file with a name of its own comes alone, under the usual name."""
    if source.is_file():
        usual = "tokenizer.json" if source.suffix == ".json" else "tokenizer.model"
        shutil.copyfile(source, directory / usual)
        source = source.parent if source.name == usual else directory
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and not (directory / name).exists():
            shutil.copyfile(source / name, directory / name)
    if (directory / "tokenizer.model").exists() and not (
        directory / "tokenizer_config.json"
    ).exists():
        write_json(
            directory / "tokenizer_config.json",
            {
                "tokenizer_class": "LlamaTokenizer",
                "legacy": True,
                "add_bos_token": True,
                "add_eos_token": False,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "clean_up_tokenization_spaces": False,
            },
        )


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in TOKENIZER_FILES[:2])


def list_states(out_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [
        path
        for path in (out_dir / "checkpoints").glob("step-*")
        if path.name.removeprefix("step-").isdigit()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or for a run directory its final/, else its newest complete checkpoint.
    Raises UserError where there is none, and says what is there instead (Meta's files, nothing at all)."""
    found = path / "final" if (path / "final").is_dir() else [path, *list_states(path)][-1]
    if not any((found / name).is_file() for name in ("config.json", "adapter_config.json")):
        open_weights(found)
    return found


def read_about(directory: Path) -> dict[str, Any]:
    """minillama.json: the template and what made the checkpoint; {} where there is none."""
    path = directory / "minillama.json"
    return read_json(path) if path.is_file() else {}


def stop_ids(directory: Path, config: LlamaConfig) -> tuple[int, ...]:
    """The ids that end a text: those of config.json and of generation_config.json."""
    path = directory / "generation_config.json"
    more = read_json(path).get("eos_token_id") if path.is_file() else None
    more = more if isinstance(more, list) else [] if more is None else [more]
    return tuple(dict.fromkeys([*config.eos_ids, *more]))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
