"""Scripts of other systems that convert models and data, as subcommands of convert.py.

    python3 -m fastchat.model.apply_delta --base-model-path …     convert.py apply_delta …
    python tools/preprocess_data.py --input …                     convert.py preprocess_data …

A script is known by its name, its path or its module, with or without .py. Its flags are names of
ours (RENAMED), may have certain values only (ALLOWED), or change no result (HARMLESS); any other is
an error. The converters of Megatron's files have a module of their own, compat/megatron.py.
"""

import argparse
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from minillama.cli import Parser
from minillama.compat import megatron
from minillama.compat.flag_tables import LLAMA_TOKENIZERS, Allowed
from minillama.compat.model_claims import size_of
from minillama.errors import UserError, closest
from minillama.files import read_json
from minillama.hf_config import published

# their script -> our subcommand
SCRIPTS = {
    "apply_delta": "apply-delta",
    "make_delta": "make-delta",
    "apply_lora": "merge-lora",
    "merge_llama_with_chinese_lora": "merge-lora",
    "merge_llama_with_chinese_lora_low_mem": "merge-lora",
    "merge_llama2_with_chinese_lora_low_mem": "merge-lora",
    "convert_llama_weights_to_hf": "meta",
    "merge_tokenizers": "tokenizer",
    "preprocess_data": "data",
    **megatron.SUBCOMMANDS,
}
# their script -> a flag and the value that it has there if it is not typed, and not here
DEFAULTS = {
    "merge_llama_with_chinese_lora": ("output_type", "pth"),
    "merge_llama_with_chinese_lora_low_mem": ("output_type", "pth"),
    "merge_llama2_with_chinese_lora_low_mem": ("output_dir", "merged_model"),
    "merge_tokenizers": ("output", "merged_tokenizer_hf/tokenizer.model"),
}
# our subcommand -> their flag -> ours
RENAMED = {
    "apply_delta": {
        "base_model_path": "base",
        "delta_path": "delta",
        "target": "output",
        "target_model_path": "output",
    },
    "make_delta": {
        "base_model_path": "base",
        "target_model_path": "target",
        "delta": "output",
        "delta_path": "output",
    },
    "merge_lora": {
        "base_model": "base",
        "base_model_path": "base",
        "lora_model": "lora",
        "lora_path": "lora",
        "output_type": "format",
        "output_dir": "output",
        "target_model_path": "output",
    },
    "meta": {"input_dir": "input", "output_dir": "output"},
    "tokenizer": {"llama_tokenizer_dir": "base", "chinese_sp_model_file": "add"},
    "data": {"tokenizer_name_or_path": "tokenizer"},
    **megatron.RENAMED,
}
# our subcommand -> their flag -> the values it may have
ALLOWED = {
    "make_delta": {
        "hub_repo_id": Allowed((), "nothing is uploaded; afterwards: hf upload NAME OUTPUT"),
    },
    "meta": {
        "safe_serialization": Allowed(("true",), "safetensors are written; --bin writes .bin"),
    },
    "data": {
        "tokenizer_type": LLAMA_TOKENIZERS,
        "json_keys": Allowed(("text",), "text for pre-training is read from the column `text`"),
        "dataset_impl": Allowed(("mmap",), "a data set is mapped into memory"),
    },
}
# our subcommand -> their flag -> why it changes no result
HARMLESS = {
    "apply_delta": {"low_cpu_mem": "every conversion goes tensor by tensor"},
    "merge_lora": {"offload_dir": "every conversion goes tensor by tensor"},
    "data": {
        "tokenizer_not_use_fast": "both tokenizers of transformers have the same ids",
        "log_interval": "progress is a bar",
        "seq_length": "documents are cut when they are trained on, at --max_length",
        "make_vocab_size_divisible_by": "padding of the embedding changes no id",
        "pad_vocab_size_to": "padding of the embedding changes no id",
    },
}

# preprocess_data: handler -> our format, and the template of conversations
HANDLERS = {
    "GeneralPretrainHandler": ("text", ""),
    "GeneralInstructionHandler": ("alpaca", "ascend_instruction"),
    "BelleMultiTurnInstructionHandler": ("ascend", "ascend_instruction"),
    "MOSSInstructionHandler": ("moss", "ascend_instruction"),
}
PRETRAINING = "GeneralPretrainHandler"  # if none is named
PLAIN_TEXT = "_text_document"  # what is appended to the prefix of text for pre-training
NO_EOD_THERE = (
    "note: documents end with EOS; AscendSpeed adds it with --append-eod alone, and so does "
    "--append_eod false here"
)


def script_of(word: str) -> str:
    """Return the name of a script, of its path or of its module."""
    return Path(word).name.removesuffix(".py").rpartition(".")[2]


def subcommand_of(word: str) -> str:
    """Return our subcommand for a script of theirs, or for a name of ours with underscores."""
    name = script_of(word)
    return SCRIPTS.get(name, name.replace("_", "-"))


def defaults_of(word: str, arguments: Sequence[str]) -> list[str]:
    """Return the flag that a script of theirs has by default, and its value; [] if it is typed."""
    script = script_of(word)
    if script not in DEFAULTS:
        return []
    name, value = DEFAULTS[script]
    our_name = RENAMED[SCRIPTS[script].replace("-", "_")]
    typed = set()
    for argument in arguments:
        flag = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        typed.add(our_name.get(flag, flag))
    is_typed = our_name.get(name, name) in typed
    return [] if is_typed else [f"--{name}", value]


def add_flags(parser: Parser, subcommand: str) -> None:
    """Let the parser of a subcommand accept their flags, which `--help` leaves out."""
    parser.renamed |= RENAMED.get(subcommand, {})
    for name, allowed in ALLOWED.get(subcommand, {}).items():
        check = partial(_check, allowed)
        parser.add_argument(f"--{name}", nargs="?", const="true", type=check, help=SUPPRESS)
    for name in HARMLESS.get(subcommand, {}):
        parser.add_argument(f"--{name}", nargs="?", help=SUPPRESS)
    if subcommand == "meta":
        parser.add_argument("--model_size", default="", help=SUPPRESS)
    if subcommand == "data":
        parser.add_argument("--output_prefix", type=Path, help=SUPPRESS)
        parser.add_argument("--handler_name", default="", help=SUPPRESS)


def _check(allowed: Allowed, value: str) -> str:
    """Return an allowed value, for argparse."""
    if value.lower() not in allowed.values:
        raise argparse.ArgumentTypeError(f"{value} is not supported: {allowed.reason}")
    return value


def preprocessing(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return what preprocess_data's flags mean: `output`, `format` and `template`.

    A handler decides about format and template, if the command does not. The files of plain text
    are called PREFIX_text_document, as AscendSpeed calls them; those of conversations PREFIX.
    """
    keys = {name: flags[name] for name in ("output", "format", "template")}
    prefix = flags["output_prefix"]
    handler = flags["handler_name"] or (PRETRAINING if prefix else "")
    if handler:
        keys |= _keys_of_handler(handler, flags)
    if prefix is not None:
        if flags["output"] is not None:
            raise UserError("--output and --output_prefix: give one of them")
        ending = PLAIN_TEXT if handler == PRETRAINING else ""
        keys["output"] = prefix.with_name(prefix.name + ending)
    if keys["output"] is None:
        raise UserError("the following arguments are required: --output; --help lists every flag")
    return keys


def preprocessing_note(flags: Mapping[str, Any]) -> str:
    """Return what is done otherwise than by preprocess_data, for the user; "" if nothing is."""
    is_theirs = flags["output_prefix"] is not None
    return NO_EOD_THERE if is_theirs and flags["append_eod"] is None else ""


def _keys_of_handler(handler: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    if handler not in HANDLERS:
        known = ", ".join(HANDLERS)
        raise UserError(
            f"--handler_name {handler}: not known here{closest(handler, HANDLERS)}; {known}"
        )
    data_format, template = HANDLERS[handler]
    keys = {"format": data_format} if flags["format"] == "auto" else {}
    if not flags["template"]:
        keys["template"] = template
    return keys


def meta_directory(root: Path, model_size: str) -> Path:
    """Return the folder of Meta's weights that convert_llama_weights_to_hf.py would read.

    That is the folder `model_size` of Meta's root, else the root itself, if it holds that size.
    """
    if not model_size or (root / model_size).is_dir():
        return root / model_size
    if not any(root.glob("consolidated.*.pth")):
        raise UserError(
            f"{root}: holds neither a folder {model_size} nor consolidated.*.pth; name Meta's "
            "root, or the folder of the weights"
        )
    size = published(size_of(model_size.lower().removesuffix("f")))  # 7Bf: a chat model
    params = read_json(root / "params.json")
    shape = (params.get("n_layers"), params.get("dim"))
    if shape != (size.n_layers, size.dim):
        raise UserError(
            f"{root}: params.json says {shape[0]} layers of width {shape[1]}, which is not "
            f"{model_size}; leave --model_size out"
        )
    return root
