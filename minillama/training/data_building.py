"""The data of a run: from the settings to the batches of every step.

    files --> token cache --> documents --> training windows --> BatchPlan, for training
                                       `--> those held out   --> BatchPlan, for evaluation

Rank 0 tokenizes what is not in the cache; the other ranks wait, and then open the same files.

The prompt template is the one that --template names, else the one that the checkpoint or adapter
was tuned with, else that of the data. Plain text has none, so a model that is pre-trained on text
alone has none either.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minillama import comm
from minillama.chat import name_of
from minillama.checkpoint.template_files import read_template, resolve_template
from minillama.data.batches import BatchPlan, split_documents
from minillama.data.demo import VOCABULARY_SIZE, write_demo
from minillama.data.token_cache import open_data
from minillama.data.tokenize import DataOptions
from minillama.data.windows import TrainingWindows
from minillama.errors import UserError
from minillama.grid import Grid
from minillama.llama_config import LlamaConfig
from minillama.tokenizer import Tokenizer, describe_bos, open_tokenizer
from minillama.train_config import TrainConfig
from minillama.training.architecture import find_adapter

EMBEDDED = ("demo", "demo_lora")  # names of the data that the package makes itself
DEFAULT_LENGTH = 1024  # longest row, if neither the settings nor the model's context say less


@dataclass(frozen=True)
class RunData:
    """What a run trains on and is evaluated on."""

    train_batches: BatchPlan
    eval_batches: BatchPlan | None  # None: nothing is held out
    template: str  # what the model is tuned with; "" if no template is known


def with_embedded_data(config: TrainConfig, mesh: comm.Mesh) -> TrainConfig:
    """Replace the names `demo` and `demo_lora` by files, which are written to OUT_DIR/data."""
    named = [name for name in (*config.data, config.tokenizer) if name in EMBEDDED]
    if not named:
        return config
    with comm.first_rank_first(mesh):
        data, vocabulary = write_demo(named[0], Path(config.out_dir) / "data")
    is_embedded = config.tokenizer in EMBEDDED
    return replace(
        config,
        data=tuple(str(data) if name in EMBEDDED else name for name in config.data),
        tokenizer=str(vocabulary) if is_embedded else config.tokenizer,
        cache_dir=config.cache_dir or str(data.parent / "cache"),
    )


def build_tokenizer(config: TrainConfig, base: Path | None) -> Tokenizer:
    """The tokenizer that is named, or the checkpoint's."""
    source = config.tokenizer or base
    if not source:
        raise UserError("no vocabulary: name one with --tokenizer tokenizer.model")
    return open_tokenizer(Path(source))


def planned_vocabulary(config: TrainConfig, base: Path | None) -> tuple[int, str]:
    """The tokens of the tokenizer of a run that has not begun, and why it cannot be opened, or "".

    0 tokens: it is that of a trained checkpoint, or none is named.
    """
    if config.tokenizer in EMBEDDED:
        return VOCABULARY_SIZE, ""
    if not config.tokenizer and (base is None or config.init == "pretrained"):
        return 0, ""
    try:
        return build_tokenizer(config, base).size, ""
    except UserError as error:
        return 0, str(error)


def build_data(
    config: TrainConfig,
    base: Path | None,
    tokenizer: Tokenizer,
    llama: LlamaConfig,
    grid: Grid,
    continued: Path | None = None,
) -> RunData:
    """Open the data sets, tokenizing raw files once, and lay out the batches of all steps.

    continued: the checkpoint of this run that it goes on from. Its template stays.
    """
    mesh = grid.all
    if problem := length_problem(config, llama):
        raise UserError(problem)
    max_length = row_length(config, llama)
    base_template = _own_template((continued, find_adapter(config), base, tokenizer.path.parent))
    options = _data_options(config, base_template, quiet=not mesh.is_first)
    held_out = None
    with comm.first_rank_first(mesh):
        dataset = open_data(config.data, tokenizer, options)
        template = dataset.template or options.template or base_template
        mesh.print(f"template: {name_of(template)}")
        mesh.print(f"tokenizer: {describe_bos(tokenizer)}")
        if config.eval_data:
            eval_options = replace(options, template=template)
            held_out = open_data(config.eval_data, tokenizer, eval_options)

    train_documents = None  # all of them
    eval_windows = None
    if held_out is not None:
        eval_windows = TrainingWindows(held_out, max_length, None, config.max_dropped)
    elif config.validation_split:
        train_documents, eval_documents = split_documents(
            len(dataset), config.validation_split, config.seed
        )
        eval_windows = TrainingWindows(dataset, max_length, eval_documents, config.max_dropped)
    train_windows = TrainingWindows(dataset, max_length, train_documents, config.max_dropped)
    mesh.print(f"data: {train_windows.summary()}")
    if train_documents is not None and eval_windows is not None:
        _warn_of_large_documents(train_windows, eval_windows, config.validation_split, mesh)

    return RunData(
        train_batches=_train_plan(train_windows, config, grid.data.size),
        eval_batches=_eval_plan(eval_windows, config, grid.data.size) if eval_windows else None,
        template=template,
    )


def _warn_of_large_documents(
    train: TrainingWindows, held_out: TrainingWindows, fraction: float, mesh: comm.Mesh
) -> None:
    """Warn if a fraction of the documents holds out more than twice that fraction of the tokens."""
    held_out_tokens = held_out.length.sum()
    share = held_out_tokens / (held_out_tokens + train.length.sum())
    if share > 2 * fraction:
        remedy = "give --eval_data"
        if held_out.dataset.mask is None:
            remedy += ", or --data_format lines, which makes each line a document"
        mesh.print(
            f"WARNING: validation_split = {fraction} takes {held_out.documents:,} of "
            f"{held_out.documents + train.documents:,} documents, which hold {share:.0%} of the "
            f"tokens; {remedy}"
        )


def row_length(config: TrainConfig, llama: LlamaConfig) -> int:
    """The longest row of a batch, in tokens."""
    return config.max_length or min(llama.max_seq_len, DEFAULT_LENGTH)


def length_problem(config: TrainConfig, llama: LlamaConfig) -> str:
    """Why the model cannot be trained on rows of this length; an empty string if it can."""
    length = row_length(config, llama)
    if length <= llama.max_seq_len:
        return ""
    return f"max_length = {length} exceeds the model's context of {llama.max_seq_len}"


def _data_options(config: TrainConfig, base_template: str, quiet: bool) -> DataOptions:
    return DataOptions(
        data_format=config.data_format,
        template=resolve_template(config.template),
        base_template=base_template,
        append_eod=config.append_eod,
        skip_bad_records=config.skip_bad_records,
        max_samples=config.max_samples,
        max_dropped=config.max_dropped,
        dataset_dir=config.dataset_dir,
        cache_dir=config.cache_dir,
        workers=config.workers,
        quiet=quiet,
    )


def _own_template(directories: Sequence[Path | None]) -> str:
    """The template of the first directory that says what it was tuned with."""
    for directory in directories:
        template = read_template(directory) if directory else ""
        if template:
            return template
    return ""


def _train_plan(windows: TrainingWindows, config: TrainConfig, data_ranks: int) -> BatchPlan:
    rows_per_rank = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return BatchPlan(
        windows,
        rows_per_step=rows_per_rank * data_ranks,
        rows_per_micro_batch=config.per_device_train_batch_size,
        seed=config.seed,
        packing=config.packing,
        epochs=config.num_train_epochs,
        max_steps=config.max_steps,
    )


def _eval_plan(windows: TrainingWindows, config: TrainConfig, data_ranks: int) -> BatchPlan:
    return BatchPlan(
        windows,
        rows_per_step=config.per_device_eval_batch_size * data_ranks,
        rows_per_micro_batch=config.per_device_eval_batch_size,
        seed=0,
        packing=config.packing,
        shuffle=False,
    )
