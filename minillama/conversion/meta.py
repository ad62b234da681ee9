"""Meta's consolidated.*.pth to Hugging Face's layout, and back.

Three things differ: the names of tensors, the files (each of Meta's holds a slice of every matrix,
each of Hugging Face's holds whole tensors), and the rotary order of q and k. All three are
described in meta_layout.py; meta_reader.py and meta_writer.py are the two directions.

This module leaves out the scaled rotary frequencies of LLaMA 3.1, whose numbers Meta's files do not
hold.
"""

from dataclasses import replace
from pathlib import Path

from minillama.checkpoint.hf_reader import EMBEDDING, check_names, open_weights
from minillama.checkpoint.hf_writer import write_configs
from minillama.checkpoint.stop_tokens import write_stop_ids
from minillama.checkpoint.tokenizer_files import contradiction, has_tokenizer
from minillama.conversion.meta_reader import read_meta
from minillama.conversion.meta_writer import write_meta
from minillama.conversion.writer import Conversion, Output, write_checkpoint
from minillama.errors import UserError
from minillama.hf_config import read_config
from minillama.tokenizer import open_tokenizer


def meta_to_hf(
    source: Path, output: Output, tokenizer: Path | str = "", max_seq_len: int = 0
) -> Conversion:
    """Convert the directory `source` from Meta's layout to Hugging Face's.

    Returns what was written, with notes for the user.

    Args:
        tokenizer: its file; empty: the one beside the weights, or one directory up.
        max_seq_len: context length; 0: by transformers' rule.

    Raises UserError for damaged files, and for a tokenizer of another model.
    """
    checkpoint = read_meta(source)
    config = checkpoint.config
    notes = []
    beside = _directory_with_tokenizer(source)
    chosen = tokenizer or beside
    opened = open_tokenizer(chosen) if chosen else None
    if tokenizer and opened and beside:
        problem = contradiction(opened, beside)
        if problem:
            notes.append(f"warning: {problem}; the text of the converted model may be nonsense")
    if opened is None:
        notes.append(
            f"warning: no tokenizer.model in {source} or above it, so the output has none "
            "(--tokenizer FILE adds it)"
        )
        notes.append(f"the embedding's {config.vocab_size} rows give the vocabulary")
    elif opened.size > config.vocab_size:
        raise UserError(
            f"{opened.path}: {opened.size} tokens, but the embedding has {config.vocab_size} rows; "
            "name the right one with --tokenizer"
        )
    if max_seq_len:
        config = replace(config, max_seq_len=max_seq_len)
    else:
        remedy = "Meta's files do not say; --max_seq_len sets it"
        notes.append(f"context length {config.max_seq_len}, by transformers' rule ({remedy})")
    dtype = output.dtype or checkpoint.tensors[EMBEDDING].dtype

    def write_other_files(directory: Path) -> None:
        write_configs(directory, config, dtype, opened)
        write_stop_ids(directory)

    inputs = [source] if opened is None else [source, opened.path]
    return write_checkpoint(output, inputs, checkpoint.tensors, write_other_files, notes=notes)


def hf_to_meta(source: Path, output: Output, num_shards: int = 0) -> Conversion:
    """Convert the directory `source` from Hugging Face's layout to Meta's.

    Returns what was written. num_shards: files of weights; 0: as many as Meta has for this width.
    """
    config = read_config(source)
    tensors = open_weights(source)
    check_names(config, tensors, source)
    return write_meta(output, [source], tensors, config, companions=source, num_shards=num_shards)


def _directory_with_tokenizer(source: Path) -> Path | None:
    """The directory of the weights, or the one above it: the first that has a tokenizer."""
    for directory in (source, source.resolve().parent):
        if has_tokenizer(directory):
            return directory
    return None
