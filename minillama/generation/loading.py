"""Open what --ckpt names: a Hugging Face directory, a run directory, or an adapter over its base.

    base weights ──▶ Llama ──▶ + adapter 1 + adapter 2 … ──▶ Engine with tokenizer and template

Adapters are not merged: two on one linear layer become one of both ranks (`load_adapter`).
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from minillama import chat, ops
from minillama.checkpoint.hf_reader import load_model, non_finite_on_any_rank
from minillama.checkpoint.placing import loading_plan, put_on
from minillama.checkpoint.run_directory import find_checkpoint
from minillama.checkpoint.stop_tokens import with_stop_ids
from minillama.checkpoint.template_files import (
    read_chat_template,
    read_template,
    resolve_template,
)
from minillama.checkpoint.tokenizer_files import contradiction, has_tokenizer
from minillama.comm import Mesh
from minillama.device import compute_dtype
from minillama.device_list import pick_devices
from minillama.errors import UserError
from minillama.generation.config import GenerationConfig
from minillama.generation.engine import Engine
from minillama.hf_config import read_config
from minillama.hub import hub_hint
from minillama.int8_layers import quantize_linear
from minillama.lora import load_adapter
from minillama.model import Llama
from minillama.parallel.tensor import connect_ranks
from minillama.parallel.whole import sample_evenly
from minillama.peft_config import base_model_of
from minillama.tokenizer import TokenIds, Tokenizer, open_tokenizer

CHECKSUM_SAMPLES = 4096  # about how many values of each parameter `weights_checksum` reads


@dataclass(frozen=True)
class LoadOptions:
    """Which model to load, and how. The names are those of the flags of every script."""

    ckpt: str  # checkpoint, run or adapter directory
    base: str = ""  # base model of an adapter; "": the one its config names
    lora: tuple[str, ...] = ()  # adapters to add unmerged
    tokenizer: str = ""  # "": the checkpoint's own
    device: str = "auto"
    devices: str = ""  # several, over which the layers are spread: `device_list` has the forms
    dtype: str = "float32"  # of the computation; "int8": weights only
    ops: str = ""  # forms of the ops: see `ops.choose`


class ModelAndBase(NamedTuple):
    model: Llama
    base: Path  # the directory of the base weights


def load_engine(
    options: LoadOptions,
    config: GenerationConfig | None = None,
    devices: Sequence[torch.device] = (),
    needs_text: bool = True,
    mesh: Mesh | None = None,
) -> Engine:
    """A model ready to complete prompts; without a `config` it is greedy.

    devices: in place of options.device and options.devices, for a rank that has its own.
    needs_text: whether a model without a tokenizer is refused; else its completions are ids.
    mesh: a line of tensor ranks that divide the model; each of them calls this.
    """
    mesh = mesh or Mesh()
    ops.choose(options.ops)
    path = find_checkpoint(Path(options.ckpt))
    if not devices:
        several = mesh.size > 1
        devices = [mesh.device] if several else pick_devices(options.device, options.devices)
    model, base = load_with_adapters(path, options.base, options.lora, options.dtype, devices, mesh)
    tokenizer = find_tokenizer(options.tokenizer, path, base, needs_text)
    config = config or GenerationConfig(greedy=True)
    config = replace(config, template=choose_template(config.template, path, base))
    check_vocabulary(tokenizer, model)
    warn_of_unknown_rows(tokenizer, model, base)
    if options.tokenizer:
        warn_of_other_tokens(tokenizer, path if has_tokenizer(path) else base)
    eos_ids = with_stop_ids(model.config, base, tokenizer, "").eos_ids
    return Engine(model, tokenizer, config, eos_ids, path, mesh)


def find_tokenizer(name: str, path: Path, base: Path, needs_text: bool) -> Tokenizer:
    """The tokenizer that is named, else that of the checkpoint or adapter, else its base's."""
    source = path if has_tokenizer(path) else base
    if name or needs_text:
        return open_tokenizer(name or source)
    reason = f"{source} has no tokenizer"
    if has_tokenizer(source):
        try:
            return open_tokenizer(source)
        except UserError as error:
            reason = str(error)
    print(f"note: {reason}, so token ids are written", file=sys.stderr)
    return TokenIds(source)


def choose_template(name: str, path: Path, base: Path) -> str:
    """The template to use: `name`, else the one the checkpoint was tuned with, else "none".

    Warns of a template that nothing says the model was tuned with.
    """
    tuned_with = read_template(path) or read_template(base)
    template = resolve_template(name) or tuned_with or "none"
    if template not in ("none", "raw", tuned_with) and not read_chat_template(base):
        if tuned_with:
            known = f"was tuned with the template {chat.name_of(tuned_with)}"
        else:
            known = "names no prompt template, as base models do not"
        asked_for = chat.name_of(template)
        print(f"warning: {path} {known}; it may not understand {asked_for}", file=sys.stderr)
    return template


def check_vocabulary(tokenizer: Tokenizer, model: Llama) -> None:
    """Raises UserError if the tokenizer has tokens that the embedding has no row for."""
    vocab_size = model.config.vocab_size
    if tokenizer.size > vocab_size:
        raise UserError(
            f"{tokenizer.path} has {tokenizer.size} pieces, the model's embedding {vocab_size} "
            "rows; name the tokenizer it was trained with: --tokenizer FILE"
        )


def warn_of_unknown_rows(tokenizer: Tokenizer, model: Llama, base: Path) -> None:
    """Warn where an adapter enlarged the embedding, and the tokenizer does not know its rows."""
    vocab_size = model.config.vocab_size
    if 0 < tokenizer.size < vocab_size and read_config(base).vocab_size < vocab_size:
        print(
            f"warning: an adapter enlarges the embedding to {vocab_size} rows, but "
            f"{tokenizer.path} has {tokenizer.size} tokens; name the tokenizer that the adapter "
            "was trained with: --tokenizer FILE",
            file=sys.stderr,
        )


def warn_of_other_tokens(tokenizer: Tokenizer, source: Path) -> None:
    """Warn if the tokenizer that was named contradicts the one in `source`."""
    problem = contradiction(tokenizer, source)
    if problem:
        print(f"warning: {problem}; the text may be nonsense", file=sys.stderr)


def load_with_adapters(
    path: Path,
    base: str,
    adapters: Sequence[str],
    dtype: str,
    devices: Sequence[torch.device],
    mesh: Mesh | None = None,
) -> ModelAndBase:
    """Load the model at `path`, which may itself be an adapter, and add `adapters` to it.

    base: the base model of an adapter, in place of the one its config names. The model comes in
    evaluation mode, frozen, on `devices`. mesh: a line of tensor ranks that divide it.
    """
    mesh = mesh or Mesh()
    is_int8 = dtype == "int8"
    torch_dtype, warning = compute_dtype("bfloat16" if is_int8 else dtype, devices[0])
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    adapter_paths = [Path(adapter) for adapter in adapters]
    base_path = path
    if (path / "adapter_config.json").is_file():
        adapter_paths.insert(0, path)
        base_path = find_base(path, base)
    elif base:
        raise UserError(
            f"--base {base} would be ignored: {path} is a whole model, not an adapter; "
            "leave one of them out, or add an adapter with --lora DIR"
        )
    if is_int8:
        _refuse_beside_int8(adapter_paths, base_path, mesh)
    device_of = loading_plan(read_config(base_path), devices)
    quantize = quantize_linear if is_int8 else None
    model = load_model(
        base_path, torch_dtype, device_of=device_of, after_reading=quantize, mesh=mesh
    )
    replaced_by: dict[str, Path] = {}  # a module that an adapter replaces whole -> the adapter
    for adapter in adapter_paths:
        config = load_adapter(model, adapter, dropout=0.0, mesh=mesh)
        for name in (*config.modules_to_save, *config.modules_to_copy):
            if name in replaced_by:
                raise UserError(
                    f"{adapter}: replaces {name} whole, and so does {replaced_by[name]}; "
                    "merge them one after the other with convert.py merge-lora"
                )
            replaced_by[name] = adapter
    connect_ranks(model, mesh)
    model = put_on(model, devices).eval().requires_grad_(False)
    name = non_finite_on_any_rank(model, mesh)
    if name:  # attention can hide NaN: fluent text would come out
        raise UserError(
            f"{base_path}: {name} holds NaN or infinity (in {torch_dtype}); the weights or an "
            "adapter are damaged, or too large for this --dtype: use an intact copy, or float32"
        )
    return ModelAndBase(model, base_path)


def _refuse_beside_int8(adapters: Sequence[Path], base: Path, mesh: Mesh) -> None:
    """Raise UserError for what int8 weights cannot be combined with."""
    if adapters:
        raise UserError(
            f"--dtype int8 does not take an adapter beside the weights ({adapters[0]}); merge "
            f"it first: python convert.py merge-lora --base {base} --lora {adapters[0]} "
            "--output MERGED_DIR"
        )
    if mesh.size > 1:
        raise UserError(
            "--dtype int8 and --tensor_parallel: a rank has some columns of a weight, and rounding "
            "needs the largest value of all; use --dtype bfloat16, or one rank"
        )


def find_base(adapter: Path, base: str) -> Path:
    """The base model's directory: `base`, or the one that the adapter's config names."""
    if not base:
        base = base_model_of(adapter)
    directory = Path(base)
    if not directory.is_dir():
        raise UserError(
            f"{adapter}: its base model {directory} is not here; name it with --base DIR"
            f"{hub_hint(directory)}"
        )
    return find_checkpoint(directory)


def weights_checksum(model: Llama, mesh: Mesh | None = None) -> str:
    """A sha256 over evenly spaced values of each whole parameter, adapters included.

    mesh: a line of tensor ranks that have the parts; each of them calls this.
    """
    digest = hashlib.sha256()
    parameters = dict(model.named_parameters())
    for values in sample_evenly(parameters, CHECKSUM_SAMPLES, mesh or Mesh()):
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
