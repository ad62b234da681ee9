"""Whatever --ckpt names, as a session: a Hugging Face directory, a run directory, or an adapter over its base."""

from argparse import Namespace
from pathlib import Path

from minillama import chat, device, ops
from minillama.checkpoint import directory as checkpoints
from minillama.errors import UserError, closest
from minillama.generation.sampling import Sampling
from minillama.generation.session import Session
from minillama.lora import load_adapter, read_adapter_config
from minillama.model import Llama
from minillama.tokenizer import open_tokenizer


def load_session(options: Namespace, sampling: Sampling, max_new_tokens: int = 0, template: str = "", ignore_eos: bool = False,
                 stop: tuple[str, ...] = ()) -> tuple[Session, Path]:
    """(session, the directory in use) for a script's `Parser.add_model_flags`. template "": the checkpoint's own."""
    ops.choose(options.ops)
    path = checkpoints.find_checkpoint(Path(options.ckpt))
    model, base = load_with_adapters(path, options.base, options.lora, options.dtype, options.device)
    tokenizer = open_tokenizer(options.tokenizer or (path if checkpoints.has_tokenizer(path) else base))
    template = template or checkpoints.read_about(path).get("template") or "none"
    if template not in (*chat.TEMPLATES, "none"):
        raise UserError(f"no template {template!r}{closest(template, chat.TEMPLATES)}; templates: none, {', '.join(chat.TEMPLATES)}")
    stop_ids = () if ignore_eos else checkpoints.stop_ids(base, model.config)
    if tokenizer.size > model.config.vocab_size:
        raise UserError(f"{tokenizer.path} has {tokenizer.size} pieces, the model's embedding {model.config.vocab_size} rows; "
                        "name the tokenizer it was trained with: --tokenizer FILE")
    return Session(model, tokenizer, template, sampling, max_new_tokens, stop_ids, stop), path


def load_with_adapters(path: Path, base_named: str, adapters: list[str], dtype: str, device_name: str) -> tuple[Llama, Path]:
    """(model in evaluation mode on its device, its base directory); `path` may itself be an adapter."""
    place = device.pick(device_name)
    wanted, warning = device.compute_dtype(dtype, place)
    if warning:
        print(f"warning: {warning}")
    layers = [Path(adapter) for adapter in adapters]
    base = path
    if (path / "adapter_config.json").is_file():
        layers.insert(0, path)
        base = checkpoints.find_checkpoint(Path(base_named or read_adapter_config(path)[1]))
        if not base.is_dir():
            raise UserError(f"{path}: its base model {base} is not here; name it with --base DIR")
    model = checkpoints.load_model(base, wanted)
    for adapter in layers:
        load_adapter(model, adapter, dropout=0.0)
    return model.to(place).eval().requires_grad_(False), base
