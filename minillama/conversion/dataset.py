"""Raw files to a tokenized data set, PREFIX.bin .mask .idx .json: the work is `build_dataset`'s.

This path imports no torch.
"""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minillama.checkpoint.template_files import read_template, resolve_template
from minillama.data.renames import complete_dataset
from minillama.data.sources import find_sources
from minillama.data.tokenize import DataOptions, build_dataset
from minillama.errors import UserError
from minillama.output_directory import refuse_overlap
from minillama.tokenizer import open_tokenizer

SUFFIXES = (".json", ".bin", ".mask", ".idx")


@dataclass(frozen=True)
class TokenizedDataset:
    """A data set that was written. `str()` gives the lines for the user."""

    prefix: Path
    tokenizer: Path
    documents: int
    tokens: int
    targets: int  # tokens that are trained on
    skipped_records: int
    template: str  # empty: plain text, for pre-training
    seconds: float

    def __str__(self) -> str:
        counts = f"{self.documents} documents, {self.tokens} tokens, {self.targets} targets"
        rest = f"{self.skipped_records} records skipped, {self.seconds:.1f} s"
        command = shlex.join(self.training_command())
        return f"{self.prefix}: {counts}, {rest}\nnext: {command}"

    def training_command(self) -> list[str]:
        """Return the words of a command that trains on this data set."""
        words = ["python", "train.py", "--config"]
        if self.template:
            words += ["7b_lora", "--ckpt", "LLAMA_DIR"]
        else:
            words += ["7b_pretrain", "--tokenizer", str(self.tokenizer)]
        return [*words, "--data", str(self.prefix)]


def tokenize_files(
    files: Sequence[Path | str],
    tokenizer: Path | str,
    prefix: Path,
    options: DataOptions = DataOptions(),
    overwrite: bool = False,
) -> TokenizedDataset:
    """Tokenize files, folders and named data sets into the data set PREFIX.

    tokenizer: its file, or a directory that holds one. Raises UserError for an existing data set,
    unless `overwrite`, for an input that the data set would replace, and for malformed records,
    unless options.skip_bad_records.
    """
    started = time.monotonic()
    complete_dataset(prefix)
    opened = open_tokenizer(tokenizer)
    options = replace(
        options,
        template=resolve_template(options.template),
        base_template=read_template(opened.path.parent),
    )
    inputs = [source.path for source in find_sources(files, dataset_dir=options.dataset_dir)]
    for suffix in SUFFIXES:
        refuse_overlap(Path(f"{prefix}{suffix}"), [*inputs, opened.path])
    for suffix in SUFFIXES:
        path = Path(f"{prefix}{suffix}")
        if path.exists() and not overwrite:
            raise UserError(
                f"{path}: already exists; --overwrite replaces the data set "
                "once the new one is complete"
            )
    meta = build_dataset(files, opened, prefix, options)
    return TokenizedDataset(
        prefix=prefix,
        tokenizer=opened.path,
        documents=meta["documents"],
        tokens=meta["tokens"],
        targets=meta["targets"],
        skipped_records=len(meta["skipped_records"]),
        template=meta["template"],
        seconds=time.monotonic() - started,
    )
