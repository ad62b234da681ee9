"""The tokens that end a text. A model may have been taught any of several:

    config.json               eos_token_id
    generation_config.json    eos_token_id
    the tokenizer             its EOS
    the prompt template       what it puts behind an answer: EOS, or for llama3 <|eot_id|>

Generation ends at all of them. Where one is missing in the configs, saving adds it, so that other
programs end there too.
"""

from dataclasses import replace
from pathlib import Path

from minillama.checkpoint.template_files import read_template
from minillama.checkpoint.tokenizer_files import has_tokenizer
from minillama.data.encode import end_of_answer
from minillama.files import read_json, write_json
from minillama.hf_config import read_config, stop_ids, to_hf
from minillama.llama_config import LlamaConfig
from minillama.tokenizer import Tokenizer, open_tokenizer


def end_ids(tokenizer: Tokenizer, template: str) -> tuple[int, ...]:
    """The tokenizer's EOS, and the token that ends an answer in a template ("" or "none": none)."""
    names = ["eos", end_of_answer(tokenizer, template)]
    ids = [tokenizer.control_id(name) for name in names if name]
    return tuple(dict.fromkeys(token for token in ids if token is not None))


def with_stop_ids(
    config: LlamaConfig, base: Path | None, tokenizer: Tokenizer, template: str
) -> LlamaConfig:
    """`config` with every token that ends a text. base: the model that it was tuned from."""
    known = stop_ids(base, config) if base else config.eos_ids
    return replace(config, eos_ids=tuple(dict.fromkeys([*known, *end_ids(tokenizer, template)])))


def write_stop_ids(directory: Path) -> None:
    """Add to a finished model directory's configs the tokens that end a text and are missing."""
    if not has_tokenizer(directory):
        return
    config = read_config(directory)
    tokenizer = open_tokenizer(directory)
    complete = with_stop_ids(config, directory, tokenizer, read_template(directory))
    if complete.eos_ids == stop_ids(directory, config):
        return
    eos_token_id = to_hf(complete)["eos_token_id"]
    for name in ("config.json", "generation_config.json"):
        content = read_json(directory / name)
        write_json(directory / name, content | {"eos_token_id": eos_token_id})
