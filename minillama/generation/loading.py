"""Whatever --ckpt names, as a session: a Hugging Face directory, a run directory, or an adapter over its base."""

import hashlib
import sys
from argparse import Namespace
from pathlib import Path

import torch
from torch import nn

from minillama import chat, device, ops
from minillama.checkpoint import hf_format as checkpoints
from minillama.errors import UserError, closest, read_json
from minillama.generation.engine import Engine
from minillama.generation.sampling import Sampling
from minillama.lora import LoraLinear, load_adapter, read_adapter_config
from minillama.model import Llama
from minillama.tokenizer import open_tokenizer


def load_engine(
    options: Namespace, template: str = "", place: torch.device | None = None
) -> tuple[Engine, Path]:
    """(greedy session, the directory in use) for a script's `Parser.add_model_flags`. template "": the checkpoint's own.
    place: in place of options.device, for a rank that has a device of its own."""
    ops.choose(options.ops)
    path = checkpoints.find_checkpoint(Path(options.ckpt))
    model, base = load_with_adapters(
        path, options.base, options.lora, options.dtype, place or device.pick(options.device)
    )
    tokenizer = open_tokenizer(
        options.tokenizer or (path if checkpoints.has_tokenizer(path) else base)
    )
    tuned = checkpoints.read_about(path).get("template")
    template = template or tuned or "none"
    if template not in (*chat.TEMPLATES, "none"):
        raise UserError(
            f"no template {template!r}{closest(template, chat.TEMPLATES)}; templates: none, {', '.join(chat.TEMPLATES)}"
        )
    if template not in ("none", "raw", tuned) and not _has_chat_template(base):
        known = (
            f"was tuned with the template {tuned}"
            if tuned
            else "does not say that it was tuned with one, as base models are not"
        )
        print(f"warning: {path} {known}; it may not understand {template}", file=sys.stderr)
    if tokenizer.size > model.config.vocab_size:
        raise UserError(
            f"{tokenizer.path} has {tokenizer.size} pieces, the model's embedding {model.config.vocab_size} rows; "
            "name the tokenizer it was trained with: --tokenizer FILE"
        )
    return Engine(
        model,
        tokenizer,
        template,
        Sampling(temperature=0.0),
        0,
        checkpoints.stop_ids(base, model.config),
    ), path


def load_with_adapters(
    path: Path, base_named: str, adapters: list[str], dtype: str, place: torch.device
) -> tuple[Llama, Path]:
    """(model in evaluation mode on `place`, its base directory); `path` may itself be an adapter."""
    wanted, warning = device.compute_dtype(dtype, place)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    layers, base = list(map(Path, adapters)), path
    if (path / "adapter_config.json").is_file():
        layers.insert(0, path)
        base = Path(base_named or read_adapter_config(path)[1])
        if not base.is_dir():
            raise UserError(f"{path}: its base model {base} is not here; name it with --base DIR")
        base = checkpoints.find_checkpoint(base)
    model = checkpoints.load_model(base, wanted)
    whole: dict[str, Path] = {}
    for adapter in layers:
        for name in add_adapter(model, adapter):
            if name in whole:
                raise UserError(
                    f"{adapter}: replaces {name} whole, and so does {whole[name]}; merge them one after the other with "
                    "convert.py merge-lora"
                )
            whole[name] = adapter
    return model.to(place).eval().requires_grad_(False), base


def add_adapter(model: Llama, directory: Path) -> tuple[str, ...]:
    """Load an adapter beside those already there; returns the modules it replaces whole.
    Two on one linear are one of both ranks: A = [A1; A2], B = [s1 B1, s2 B2]."""
    earlier = {
        name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)
    }
    for name, old in earlier.items():
        model.set_submodule(name, old.plain(old.weight))
    config = load_adapter(model, directory, dropout=0.0)
    for name, old in earlier.items():
        new = model.get_submodule(name)
        if isinstance(new, LoraLinear):
            old.lora_A = nn.Parameter(torch.cat((old.lora_A, new.lora_A)))
            old.lora_B = nn.Parameter(
                torch.cat((old.scale * old.lora_B, new.scale * new.lora_B), dim=1)
            )
            old.scale = 1.0
        model.set_submodule(name, old)
    return config.modules_to_save


def weights_checksum(model: Llama) -> str:
    """A sha256 over up to 4096 numbers of each parameter, adapters included."""
    samples = (
        p.detach().flatten()[:: max(1, p.numel() // 4096)].float().cpu().numpy().tobytes()
        for p in model.parameters()
    )
    return hashlib.sha256(b"".join(samples)).hexdigest()


def _has_chat_template(directory: Path) -> bool:
    """Do the tokenizer's files describe a conversation, as those of published chat models do?"""
    path = directory / "tokenizer_config.json"
    described = path.is_file() and read_json(path).get("chat_template")
    return bool(described) or (directory / "chat_template.jinja").is_file()
