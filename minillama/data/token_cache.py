"""Open the data of a run, whatever it is: a tokenized data set, or raw files that become one.

Tokenizing takes minutes, so its result is kept in a cache. The name of a cached data set is a hash
of all that its content follows from: the files' sizes and times, the tokenizer, and the options. If
one of them changes, the name is another, and the files are tokenized again.

A data set is compared with the hashes in its PREFIX.json whenever it is opened. That reads it once:
some two seconds for a billion tokens. A damaged one in the cache is made again; a damaged one that
the user made is refused.
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minillama import chat
from minillama.data.formats import default_template
from minillama.data.megatron import MegatronDataset, find_part
from minillama.data.memmap import Dataset, is_dataset
from minillama.data.renames import complete_dataset
from minillama.data.sources import Source
from minillama.data.tokenize import (
    DataOptions,
    build_dataset,
    choose_template,
    detect_sources,
    file_stamp,
    print_omissions,
)
from minillama.errors import UserError
from minillama.files import sha256_of
from minillama.tokenizer import Tokenizer

# Formats of which an earlier version read some files in another way: line ends of plain text, and
# system messages. What it cached of them is not used.
READ_ANEW = ("text", "lines", "ascend", "sharegpt")
EITHER_KIND = ("auto", "ascend")  # formats of instruction data and of plain text


def open_data(
    paths: Sequence[str], tokenizer: Tokenizer, options: DataOptions = DataOptions()
) -> Dataset:
    """Open a data set of `convert.py data` or AscendSpeed, or tokenize raw files into the cache.

    Raises UserError for a data set that is damaged, was made with another tokenizer or template,
    or from a file that has changed since.
    """
    if len(paths) == 1:
        complete_dataset(paths[0])
        if find_part(paths[0]):
            dataset: Dataset = MegatronDataset(paths[0], tokenizer.size)
            _refuse_contradictions(dataset, options)
            return dataset
        if is_dataset(paths[0]):
            dataset = Dataset(paths[0], verify=True)
            _check_origin(dataset, tokenizer, options.template)
            _refuse_contradictions(dataset, options)
            return dataset
    sources = detect_sources(paths, options)
    prefix = _cache_prefix(sources, tokenizer, options)
    complete_dataset(prefix)
    if is_dataset(prefix):
        try:
            dataset = Dataset(prefix, verify=True)
        except UserError as error:
            print(f"the cached data is damaged, and made again: {error}", file=sys.stderr)
        else:
            if not options.quiet:
                print_omissions(prefix, dataset.meta)
            return dataset
    build_dataset(paths, tokenizer, prefix, options)
    return Dataset(prefix)


def _refuse_contradictions(dataset: Dataset, options: DataOptions) -> None:
    """Raise UserError for an option that does not hold for a tokenized data set."""
    problem = ""
    is_text = dataset.mask is None
    kind = "plain text" if is_text else "instruction data"
    has_template = bool(default_template({options.data_format}))  # text and lines have none
    if options.max_samples:
        problem = f"max_samples = {options.max_samples} counts records of raw files"
    elif options.data_format not in EITHER_KIND and has_template == is_text:
        problem = f"data_format = {options.data_format!r}"
    elif not options.append_eod and dataset.meta.get("append_eod", True):
        problem = "append_eod = False holds for raw files"
    if problem:
        raise UserError(
            f"{problem}, but {dataset.prefix} is tokenized {kind}; leave the option out, or name "
            "the raw files"
        )


def _check_origin(dataset: Dataset, tokenizer: Tokenizer, template: str) -> None:
    """Raise UserError if the data set was not made with this tokenizer, template and content.

    template: empty means any.
    """
    command = f"convert.py data --input FILE --tokenizer {tokenizer.path} --output {dataset.prefix}"
    remedy = f"make it again with `{command}`"
    if dataset.meta.get("tokenizer_sha256") != tokenizer.sha256:
        raise UserError(
            f"{dataset.prefix}: was made with another tokenizer than {tokenizer.path}; {remedy}"
        )
    made_with = dataset.meta.get("template")  # empty for plain text, which has no template
    if template and made_with and not _are_same_template(template, made_with):
        raise UserError(
            f"{dataset.prefix}: was made with the template {chat.name_of(made_with)}, not "
            f"{chat.name_of(template)}; "
            f"leave --template out, or {remedy}"
        )
    for name, made_from in dataset.meta.get("sources", {}).items():
        if _has_changed(Path(name), made_from):
            raise UserError(
                f"{dataset.prefix}: {name} has changed since it was tokenized; {remedy}"
            )


def _are_same_template(name: str, other_name: str) -> bool:
    """Whether two names, such as `default` and `llama_factory_default`, stand for one template."""
    if chat.is_jinja(name) or chat.is_jinja(other_name):
        return name == other_name
    return chat.find_template(name) is chat.find_template(other_name)


def _has_changed(path: Path, made_from: dict[str, Any]) -> bool:
    """Whether a source file is there and has another content than `made_from` says."""
    if not path.is_file():
        return False
    stamp = {key: made_from[key] for key in ("bytes", "mtime_ns")}
    if file_stamp(path) == stamp:
        return False
    return sha256_of(path) != made_from["sha256"]


def _cache_prefix(sources: list[Source], tokenizer: Tokenizer, options: DataOptions) -> Path:
    """Where the cached data set of these sources is, or will be."""
    files = []
    for source in sources:
        files.append((str(source.path.resolve()), source.columns, file_stamp(source.path)))
    choices: dict[str, Any] = {
        "data_format": options.data_format,
        "template": choose_template(sources, options),
        "append_eod": options.append_eod,
        "skip_bad_records": options.skip_bad_records,
    }
    if options.max_samples:
        choices["max_samples"] = options.max_samples
    if any(source.data_format in READ_ANEW for source in sources):
        choices["reader"] = 2
    key = json.dumps([files, tokenizer.sha256, choices], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return _cache_folder(options.cache_dir) / f"{sources[0].path.stem}-{digest}"


def _cache_folder(cache_dir: str) -> Path:
    """The folder of the cache, which is created: `cache_dir`, else one in the user's home."""
    if cache_dir:
        return Path(cache_dir)
    folder = _user_cache() / "minillama"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: the cache of tokenized data cannot be made there ({error.strerror}); "
            "name a folder: --cache_dir DIR"
        ) from None
    return folder


def _user_cache() -> Path:
    user_cache = os.environ.get("XDG_CACHE_HOME")
    if user_cache:
        return Path(user_cache)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as in some containers
        raise UserError(
            "no home directory for the cache of tokenized data; name a folder: --cache_dir DIR"
        ) from None
