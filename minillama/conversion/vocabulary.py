"""A larger vocabulary: LLaMA's tokenizer.model with the tokens of another SentencePiece model.

Chinese-LLaMA's vocabulary was made like this: old tokens keep their ids, new ones are appended.
`merge_vocabularies` in tokenizer.py has the file format.
"""

from dataclasses import dataclass
from pathlib import Path

from minillama.errors import UserError
from minillama.files import write_bytes
from minillama.output_directory import refuse_overlap
from minillama.tokenizer import merge_vocabularies, open_tokenizer


@dataclass(frozen=True)
class MergedTokenizer:
    """A merged tokenizer.model. `str()` gives the line for the user."""

    path: Path
    base_size: int  # tokens of the base
    size: int
    sha256: str

    def __str__(self) -> str:
        added = self.size - self.base_size
        sum_of_sizes = f"{self.base_size} + {added} = {self.size} tokens"
        return f"{self.path}: {sum_of_sizes}, sha256 {self.sha256}"


def merge_tokenizers(
    base: Path, added: Path, output: Path, overwrite: bool = False
) -> MergedTokenizer:
    """Write the tokenizer.model `base` with the new tokens of `added` appended.

    Raises UserError for an existing output, unless `overwrite`, for one that is an input, and for
    other kinds of files.
    """
    opened_base = open_tokenizer(base)
    opened_added = open_tokenizer(added)
    refuse_overlap(output, [opened_base.path, opened_added.path])
    merged = merge_vocabularies(opened_base.path, opened_added.path)
    may_write = not output.exists() or (overwrite and output.is_file())
    if not may_write:
        raise UserError(f"{output}: already exists; --overwrite replaces a file")
    write_bytes(output, merged)
    opened = open_tokenizer(output)
    return MergedTokenizer(output, opened_base.size, opened.size, opened.sha256)
