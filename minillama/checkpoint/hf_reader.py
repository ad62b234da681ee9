"""Reading a model directory: config.json, model*.safetensors (and their index), tokenizer files.

That is Hugging Face's layout of a LLaMA. Older directories hold pytorch_model*.bin in place of the
safetensors, and load alike. Loading is a loop over tensors: check name and shape, read, copy, free.
A tensor that the model needs and the files lack is an error, and so is one that the model has no
place for; nothing is filled in silently.

A rank of tensor parallelism reads its part of each tensor, and never has the whole model.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from minillama import comm
from minillama.comm import Mesh
from minillama.errors import UserError, listed
from minillama.files import read_json
from minillama.hf_config import read_config
from minillama.hub import hub_hint
from minillama.llama_config import LlamaConfig, with_layers
from minillama.model import Llama, sample_parameter
from minillama.output_directory import restore
from minillama.parallel.shards import axis_of, cut, part_of
from minillama.parallel.tensor import refuse_uncuttable, set_sizes
from minillama.tensor_files import POSITIONS, TensorRef, read_tensors

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# The name of a parameter -> where it is loaded to; the meta device: this process does not need it.
DeviceOf = Callable[[str], torch.device]


def on_host(name: str) -> torch.device:
    """The `DeviceOf` of a model that is loaded on the CPU."""
    return torch.device("cpu")


class HasShape(Protocol):
    """A tensor of a file, or one that is still to be made."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def load_model(
    directory: Path,
    dtype: torch.dtype = torch.float32,
    n_layers: int = 0,
    vocab_size: int = 0,
    device_of: DeviceOf = on_host,
    after_reading: Callable[[Llama, str], None] | None = None,
    mesh: Mesh | None = None,
) -> Llama:
    """Read a model directory as a `Llama` of `dtype`, one tensor at a time.

    n_layers: only the first N (0: all).
    vocab_size: grow the embeddings to this many rows; new rows are the mean of the old.
    device_of: where each parameter is loaded to; on the meta device it is not read.
    after_reading: called with the model and the name of each parameter that has been read; it may
        replace the parameter, so that the whole model never exists as it is in the files.
    mesh: a line of tensor ranks; this rank reads its part of each tensor, and no more.
    Raises UserError for any difference between the files and what config.json describes.
    """
    config = read_config(directory)
    tensors = open_weights(directory)
    check_names(config, tensors, directory)
    if n_layers:
        config = with_layers(config, n_layers)
    config = replace(config, vocab_size=max(vocab_size, config.vocab_size))
    model = empty_model(config, dtype, device_of, mesh)
    shapes = config.parameter_shapes()
    for name in [name for name, _ in model.named_parameters()]:
        parameter = model.get_parameter(name)
        if parameter.is_meta:
            continue
        _read_into(parameter, tensors[name], axis_of(name), shapes[name], mesh or Mesh())
        if after_reading is not None:
            after_reading(model, name)
    return model


@torch.no_grad()
def _read_into(
    parameter: Tensor, tensor: TensorRef, axis: int | None, shape: tuple[int, ...], mesh: Mesh
) -> None:
    """Fill a parameter with this rank's part of a tensor.

    shape: of the whole, which may have more rows than the file: those are the mean of its rows.
    """
    is_whole = axis is None or mesh.size == 1
    if is_whole and tensor.shape == shape:
        parameter.copy_(tensor.read())
        return
    axis = axis or 0
    part = part_of(shape[axis], mesh.rank, mesh.size)
    stop = min(part.stop, tensor.shape[axis])
    num_read = max(0, stop - part.start)
    if num_read:
        parameter.narrow(axis, 0, num_read).copy_(tensor.read_part(part.start, stop, axis))
    if num_read < len(part):
        parameter[num_read:] = tensor.read().float().mean(0).to(parameter.dtype)


def empty_model(
    config: LlamaConfig,
    dtype: torch.dtype,
    device_of: DeviceOf = on_host,
    mesh: Mesh | None = None,
) -> Llama:
    """Return a `Llama` whose parameters have memory but no values.

    device_of: where each parameter is made.
    mesh: a line of tensor ranks; this rank's part of each parameter is made.

    The model is made on the meta device first, so that torch neither initialises the parameters
    nor allocates them twice. `nn.Module.to_empty` would do the rest too, but it loads torch's
    compiler, which takes half a second.
    """
    mesh = mesh or Mesh()
    refuse_uncuttable(config, mesh.size)
    with torch.device("meta"):
        model = Llama(config)
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}"
            part = cut(parameter, axis_of(full_name), mesh.rank, mesh.size)
            values = torch.empty(part.shape, dtype=dtype, device=device_of(full_name))
            setattr(module, name, nn.Parameter(values))
        set_sizes(module)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


@torch.no_grad()
def initialise(model: Llama, generator: torch.Generator, mesh: Mesh | None = None) -> None:
    """Sample the parameters in fp32, as `Llama.initialise` does, whatever their dtype.

    mesh: a line of tensor ranks. Each samples whole tensors and keeps its parts, one tensor at a
    time, so the model does not depend on the number of ranks.
    """
    mesh = mesh or Mesh()
    shapes = model.config.parameter_shapes()
    for name, parameter in model.named_parameters():
        whole = torch.empty(shapes[name], dtype=torch.float32)
        sample_parameter(name, whole, model.config.initializer_range, generator)
        parameter.copy_(cut(whole, axis_of(name), mesh.rank, mesh.size))


def first_non_finite(model: nn.Module) -> str:
    """The name of the first parameter that holds NaN or infinity; "" if none does."""
    for name, parameter in model.named_parameters():
        smallest, largest = parameter.detach().aminmax()  # NaN where any value is NaN
        if not bool((smallest.isfinite() & largest.isfinite()).item()):
            return name
    return ""


def non_finite_on_any_rank(model: nn.Module, mesh: Mesh) -> str:
    """The name of a parameter that holds NaN or infinity on some rank; "" if none does.

    Ranks may hold different parts of the model. All get the same name.
    """
    for name in comm.gather_objects(mesh, first_non_finite(model)):
        if name:
            return name
    return ""


def open_weights(directory: Path) -> dict[str, TensorRef]:
    """Return every tensor of a model directory, by name; only headers are read.

    Raises UserError for missing or unreadable files, all of them in one message.
    """
    restore(directory)
    if not directory.is_dir():
        raise UserError(
            f"{directory}: no such directory; "
            "a checkpoint is a directory with config.json and model*.safetensors"
            f"{hub_hint(directory)}"
        )
    files = _weight_files(directory)
    weights: dict[str, TensorRef] = {}
    for tensors in open_files(files, "the index promises; download it again"):
        weights |= tensors
    return weights


def open_files(
    files: Mapping[Path, Collection[str]], promise: str, alike: bool = False
) -> list[dict[str, TensorRef]]:
    """Return the tensors in each of `files`, by name, without rotary positions.

    files: the names that each file must have.
    promise: where these come from, for the error.
    alike: whether all files may have the same names, as slices of the same tensors do.
    Raises UserError that lists all files which are missing, cannot be read, lack a name, or have a
    name that another file has.
    """
    opened = []
    problems = []
    file_of: dict[str, str] = {}  # the file in which a name was seen last
    for path, names in files.items():
        try:
            tensors = read_tensors(path)
        except UserError as error:
            problems.append(str(error))
            continue
        opened.append(
            {name: tensor for name, tensor in tensors.items() if not POSITIONS.search(name)}
        )
        for name in names:
            if name not in tensors:
                problems.append(f"{path}: lacks {name}, which {promise}")
        for name in tensors:
            if name in file_of and not alike:
                problems.append(f"{path}: {name} is in {file_of[name]} too")
            file_of[name] = path.name
    if problems:
        raise UserError(listed(problems, 8))
    return opened


def check_names(config: LlamaConfig, tensors: Mapping[str, HasShape], directory: Path) -> None:
    """Compare tensors with those that `config` describes. Raises UserError that lists differences.

    A tied head may be among the tensors or not.
    """
    shapes = config.parameter_shapes()
    problems = [f"missing {name}" for name in shapes if name not in tensors]
    for name in tensors:
        is_tied_head = config.tie_embeddings and name == HEAD
        if name not in shapes and not is_tied_head:
            problems.append(f"unexpected {name}")
    for name, shape in shapes.items():
        if name in tensors and tensors[name].shape != shape:
            problems.append(f"{name} is {tensors[name].shape}, config.json says {shape}")
    if problems:
        raise UserError(f"{directory}: the weights do not fit config.json: {listed(problems)}")


def _weight_files(directory: Path) -> dict[Path, list[str]]:
    """Return the files that hold the weights, and the tensors that an index promises in each."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).is_file():
            return {directory / name: []}  # before the index, as transformers does
        index = directory / f"{name}.index.json"
        if index.is_file():
            return _read_index(index)
    raise _no_weights(directory)


def _no_weights(directory: Path) -> UserError:
    """The error that says what a directory without weights holds instead."""
    shards = list(directory.glob("model-*-of-*.safetensors"))
    shards += directory.glob("pytorch_model-*-of-*.bin")
    if shards:
        return UserError(
            f"{directory}: holds shards ({shards[0].name}, …) without their index; "
            "download the *.index.json too"
        )
    if list(directory.glob("consolidated.*.pth")):
        return UserError(
            f"{directory}: Meta's; convert it first: "
            f"python convert.py meta --input {directory} --output {directory.name}-hf"
        )
    if (directory / "latest_checkpointed_iteration.txt").is_file():
        return UserError(
            f"{directory}: Megatron's; convert it first: "
            f"python convert.py from-megatron --input {directory} --output {directory.name}-hf"
        )
    if (directory / "adapter_config.json").is_file():
        return UserError(
            f"{directory}: a LoRA adapter, not a whole model; name its base with --base DIR"
        )
    return UserError(
        f"{directory}: holds no model*.safetensors and no pytorch_model*.bin{hub_hint(directory)}"
    )


def _read_index(index: Path) -> dict[Path, list[str]]:
    """Return the shards of an index, sorted, and the tensors in each."""
    content = read_json(index, keys={"weight_map": dict}, what="a weight index")
    files: dict[Path, list[str]] = {}
    for tensor, name in content["weight_map"].items():
        if not name or Path(str(name)).name != name:
            raise UserError(
                f"{index}: names the file {name!r}; "
                "only plain file names inside the directory are read"
            )
        files.setdefault(index.with_name(name), []).append(tensor)
    return dict(sorted(files.items()))
