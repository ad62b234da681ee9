"""The tokenizer's files in a model directory."""

from pathlib import Path
from typing import Any

from minillama.errors import UserError
from minillama.files import write_bytes, write_json
from minillama.sentencepiece_tokenizer import SentencePieceTokenizer
from minillama.tokenizer import Tokenizer, open_tokenizer

MODEL_FILES = ("tokenizer.model", "tokenizer.json")  # each is a whole tokenizer
TOKENIZER_FILES = (
    *MODEL_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# What a bare tokenizer.model means: LLaMA's own settings, by which transformers opens it.
LLAMA_TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "legacy": True,
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
}


def has_tokenizer(directory: Path) -> bool:
    """Tell whether a directory has a tokenizer."""
    return any((directory / name).is_file() for name in MODEL_FILES)


def contradiction(tokenizer: Tokenizer, directory: Path) -> str:
    """Why a tokenizer is not the one that a checkpoint was trained with: the first other token.

    Empty if each id that both have is the same token (one of them may have more), or if the
    checkpoint has no tokenizer that can be opened here.
    """
    if not has_tokenizer(directory):
        return ""
    try:
        own = open_tokenizer(directory)
    except UserError:  # such as a missing package: then there is nothing to compare with
        return ""
    for token in range(min(tokenizer.size, own.size)):
        name = tokenizer.name_of(token)
        own_name = own.name_of(token)
        if name != own_name:
            return (
                f"{tokenizer.path} is not the tokenizer of this model: id {token} is {name!r}, "
                f"and {own_name!r} in {own.path}"
            )
    return ""


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy a tokenizer and the files that describe it into a model directory.

    source: the directory that has it, or its file. A file whose name is not the usual one is copied
    alone, under the usual name. Files that `directory` has already stay.
    """
    if source.is_file():
        usual_name = "tokenizer.json" if source.suffix == ".json" else "tokenizer.model"
        write_bytes(directory / usual_name, source.read_bytes())
        source = source.parent if source.name == usual_name else directory
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and not (directory / name).exists():
            write_bytes(directory / name, (source / name).read_bytes())
    config = directory / "tokenizer_config.json"
    if (directory / "tokenizer.model").exists() and not config.exists():
        write_json(config, _config_of(directory / "tokenizer.model"))


def _config_of(path: Path) -> dict[str, Any]:
    """The tokenizer_config.json of a tokenizer.model that has none, with its own BOS and EOS."""
    tokenizer = SentencePieceTokenizer(path)
    config: dict[str, Any] = dict(LLAMA_TOKENIZER_CONFIG)
    for role, token in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if token is None:
            del config[role]
        elif token < tokenizer.num_pieces:
            config[role] = tokenizer.model.id_to_piece(token)
    config["add_bos_token"] = tokenizer.bos_id is not None
    return config
