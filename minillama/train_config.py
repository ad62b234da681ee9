"""The settings of a training run: one table, and everything that follows from it.

`TrainConfig` below is the single list of keys: section, type, default and help. From it come the TOML presets' checks, the command
line of train.py, its `--help`, and `train_config.json`. Precedence is default < preset < flag. A key that is not in the table,
or a value of the wrong type, is an error with the closest name: a misspelt key never silently keeps its default.
"""

import argparse
import dataclasses
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minillama.compat.deepspeed import flattened
from minillama.compat.flags import RENAMED, settings_from
from minillama.errors import UserError, closest, read_json

PRESETS = Path(__file__).parent / "configs"
DEVICES = ("auto", "cpu", "cuda", "npu", "mlu", "tpu")
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # torch's names -> ours


def key(
    section: str,
    default: Any,
    help: str,
    choices: Sequence[Any] = (),
    least: float = 0,
    below: float = 2**63,
) -> Any:
    """One row of the table. choices: the only values; least: the smallest a number may be; below: what it must not reach."""
    rules = {"section": section, "help": help, "choices": choices, "least": least, "below": below}
    return dataclasses.field(default=default, metadata=rules)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Every key of a run. Lists are comma-separated on the command line; 0 and "" mean what the help says."""

    ckpt: str = key("model", "", "start from this checkpoint, a Hugging Face LLaMA directory")
    init: str = key("model", "pretrained", "where the weights come from", ("pretrained", "scratch"))
    model: str = key(
        "model",
        "",
        "architecture to train from scratch: a published size (7b, 13b, 70b, …) or a config.json",
    )
    tokenizer: str = key(
        "model", "", "tokenizer.model or tokenizer.json; empty: the checkpoint's own"
    )
    n_layers: int = key(
        "model", 0, "layers; of a checkpoint or a published size: only the first N (0: all)"
    )
    dim: int = key("model", 0, "model width, from scratch (0: as `model` says)")
    n_heads: int = key("model", 0, "query heads, from scratch")
    n_kv_heads: int = key("model", 0, "key/value heads, from scratch")
    ffn_dim: int = key("model", 0, "MLP width, from scratch")
    vocab_size: int = key("model", 0, "vocabulary, from scratch (0: the tokenizer's)")
    context: int = key("model", 0, "longest sequence the model is made for, from scratch")
    initializer_range: float = key(
        "model", 0.02, "standard deviation of the first weights, from scratch"
    )

    data: tuple[str, ...] = key(
        "data",
        (),
        "training data: files, folders, names in dataset_info.json, or a prefix of `convert.py data`",
    )
    eval_data: tuple[str, ...] = key("data", (), "validation data, likewise")
    validation_split: float = key(
        "data",
        0.0,
        "fraction of the training documents held out for validation, without eval_data",
        below=1,
    )
    dataset_dir: str = key(
        "data", "data", "folder of the dataset_info.json that gives names of data sets meaning"
    )
    data_format: str = key(
        "data",
        "auto",
        "format of raw files",
        ("auto", "alpaca", "sharegpt", "moss", "ascend", "text", "lines"),
    )
    template: str = key("data", "", "prompt template (empty: the checkpoint's own, else alpaca)")
    packing: bool = key(
        "data",
        True,
        "fill each row with several documents up to max_length; false: one document a row",
    )
    max_length: int = key(
        "data",
        0,
        "longest row in tokens; longer samples are cut there (0: the model's context, at most 1024)",
    )
    append_eod: bool = key("data", True, "end each training document with the end-of-text token")
    skip_bad_records: bool = key(
        "data", False, "leave malformed records out, count and list them, instead of stopping"
    )
    workers: int = key("data", 1, "processes that tokenize")
    cache_dir: str = key(
        "data", "", "where tokenized raw files are kept (empty: ~/.cache/minillama)"
    )

    lora: bool = key(
        "lora", False, "train low-rank adapters instead of the weights; any key below turns it on"
    )
    lora_rank: int = key("lora", 8, "rank R of the adapters", least=1)
    lora_alpha: float = key(
        "lora", 0.0, "adapters are scaled by alpha / rank (0: alpha is twice the rank)"
    )
    lora_dropout: float = key("lora", 0.0, "dropout on the adapters' input", below=1)
    lora_targets: tuple[str, ...] = key(
        "lora", ("q_proj", "v_proj"), "linears that get an adapter, by name, or `all`"
    )
    modules_to_save: tuple[str, ...] = key(
        "lora", (), "modules trained whole beside the adapters: embed_tokens, lm_head"
    )
    use_rslora: bool = key("lora", False, "scale by alpha / sqrt(rank)")
    adapter: str = key("lora", "", "start from this PEFT adapter directory")

    num_train_epochs: float = key(
        "train", 3.0, "passes over the data; may be a fraction", least=0.001
    )
    max_steps: int = key("train", 0, "stop after this many updates (0: as num_train_epochs says)")
    per_device_train_batch_size: int = key("train", 8, "rows a rank computes at once", least=1)
    per_device_eval_batch_size: int = key("train", 8, "rows a rank evaluates at once", least=1)
    gradient_accumulation_steps: int = key(
        "train", 1, "micro-batches a rank adds up before an update", least=1
    )
    learning_rate: float = key("train", 5e-5, "peak learning rate")
    min_learning_rate: float = key("train", 0.0, "where the cosine and linear schedules end")
    lr_scheduler_type: str = key(
        "train",
        "linear",
        "schedule after warm-up",
        ("linear", "cosine", "constant", "constant_with_warmup"),
    )
    warmup_ratio: float = key("train", 0.0, "share of the updates spent warming up", below=1)
    warmup_steps: int = key("train", 0, "updates spent warming up; wins over warmup_ratio")
    weight_decay: float = key("train", 0.0, "decay of matrices; norms and biases never decay")
    adam_beta1: float = key("train", 0.9, "AdamW's first-moment decay", below=1)
    adam_beta2: float = key("train", 0.999, "AdamW's second-moment decay", below=1)
    adam_epsilon: float = key("train", 1e-8, "AdamW's epsilon")
    max_grad_norm: float = key("train", 1.0, "clip the global gradient norm to this (0: do not)")
    gradient_checkpointing: bool = key(
        "train", False, "recompute activations in backward: less memory, about a third more time"
    )
    precision: str = key(
        "train",
        "fp32",
        "dtype of the computation; trained weights keep fp32 masters",
        tuple(PRECISIONS.values()),
    )
    initial_scale_power: int = key(
        "train", 16, "fp16: the loss is first multiplied by 2 to this power", below=128
    )
    loss_scale_window: int = key(
        "train", 1000, "fp16: double the loss scale after this many updates without overflow"
    )
    loss_scale_hysteresis: int = key("train", 2, "fp16: overflows before the loss scale is halved")
    min_loss_scale: float = key(
        "train", 1.0, "fp16: the smallest loss scale; an overflow there stops the run"
    )
    tf32: bool = key("train", False, "let cuda round the inputs of fp32 products to TF32")
    seed: int = key("train", 42, "seed of the initial weights, the order of the data and dropout")
    out_dir: str = key("train", "", "run directory (empty: runs/PRESET)")
    logging_steps: int = key("train", 10, "updates between records of metrics.jsonl", least=1)
    eval_strategy: str = key("train", "no", "when to evaluate", ("no", "steps", "epoch"))
    eval_steps: int = key("train", 100, "updates between evaluations", least=1)
    save_strategy: str = key(
        "train", "steps", "when to save a checkpoint", ("no", "steps", "epoch")
    )
    save_steps: int = key("train", 500, "updates between checkpoints", least=1)
    save_total_limit: int = key("train", 2, "checkpoints kept (0: all)")
    resume: str = key(
        "train",
        "auto",
        "auto: go on from the newest checkpoint in out_dir; none; or a checkpoint directory",
    )
    plot_loss: bool = key(
        "train", False, "insist on loss.png (drawn anyway where matplotlib is installed)"
    )
    peak_tflops: float = key(
        "train", 0.0, "the device's peak TFLOP/s, to report model-FLOPs utilisation against"
    )
    device: str = key("train", "auto", "device", DEVICES)
    ops: str = key(
        "train",
        "",
        "forms of the ops: reference, fused, auto, …, or some by name: rms_norm=reference,attention=fused",
    )
    threads: int = key("train", 0, "processor threads a rank uses (0: torch's choice)", below=1025)

    zero_stage: int = key(
        "parallel",
        0,
        "what ranks share out: 1 the optimizer's state, 2 the gradients too",
        (0, 1, 2),
    )
    reduction: str = key(
        "parallel", "fast", "order in which gradients are summed", ("exact", "fast")
    )
    bucket_elements: int = key(
        "parallel", 10_000_000, "gradient elements reduced at a time", least=1
    )

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            choices, least, below = (
                KEYS[name].metadata[rule] for rule in ("choices", "least", "below")
            )
            if choices and value not in choices:
                hint = closest(str(value), map(str, choices))
                raise UserError(
                    f"{name} = {value!r}{hint}; choose one of: {', '.join(map(str, choices))}"
                )
            if isinstance(value, (int, float)) and not least <= value < below:
                raise UserError(
                    f"{name} = {value}: must {f'be at least {least}' if least else 'not be negative'}, and be "
                    f"{'finite' if below == 2**63 else f'below {below}'}"
                )


KEYS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def parse_bool(text: str) -> bool:
    found = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(
        text.lower()
    )
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return found


def parse_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def resolve(source: str, flags: dict[str, Any]) -> TrainConfig:
    """Defaults, then the preset or file `source` (a name, a .toml, or a run's train_config.json), then the flags."""
    values = read_source(source) if source else {}
    values |= settings_from(flags) | {name: value for name, value in flags.items() if name in KEYS}
    if any(KEYS[name].metadata["section"] == "lora" for name in values):
        values.setdefault("lora", True)
    asked = [name for name in ("fp16", "bf16") if flags.get(name)] or [
        values.get("precision", "fp32")
    ]
    if len(asked) == 2:
        raise UserError("--fp16 and --bf16 exclude each other; give one")
    values["precision"] = PRECISIONS.get(asked[0], asked[0])
    if source and not values.get("out_dir"):
        values["out_dir"] = f"runs/{Path(source).stem}"
    return TrainConfig(**{name: _typed(name, value, source) for name, value in values.items()})


def read_source(source: str) -> dict[str, Any]:
    """The keys of a preset (by name), of a .toml file (sections flattened), or of a train_config.json."""
    path = next(
        (path for path in (PRESETS / f"{source}.toml", Path(source)) if path.is_file()), None
    )
    if path is None:
        known = list_presets()
        raise UserError(
            f"no preset or file {source!r}{closest(source, known)}; presets: {', '.join(known)}"
        )
    try:
        tree = (
            read_json(path)
            if path.suffix == ".json"
            else tomllib.loads(path.read_text(encoding="utf-8"))
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    values: dict[str, Any] = {}
    for dotted, value in flattened(tree).items():
        section, _, name = dotted.rpartition(".")
        where, target = (
            f"{path}: [{section}] {name}" if section else f"{path}: {name}",
            RENAMED.get(name, name),
        )
        if target not in KEYS:
            raise UserError(
                f"{where}: unknown key{closest(name, KEYS)}; `train.py --help` lists every key"
            )
        if section not in ("", KEYS[target].metadata["section"]):
            raise UserError(
                f"{where}: this key belongs to section [{KEYS[target].metadata['section']}]"
            )
        values[target] = value
    return values


def _typed(name: str, value: Any, source: str) -> Any:
    """`value` as the key's own type, or an error that says which was expected."""
    wanted = type(KEYS[name].default)
    if wanted is tuple and isinstance(value, str):
        return parse_list(value)
    is_list = (
        wanted is tuple and isinstance(value, list) and all(isinstance(part, str) for part in value)
    )
    if is_list or (wanted is float and type(value) is int):
        return wanted(value)
    if type(value) is not wanted:
        raise UserError(
            f"{source or 'command line'}: {name} = {value!r}: expected {wanted.__name__}, found {type(value).__name__}"
        )
    return value


def list_presets() -> dict[str, str]:
    """Name -> what the first comment says (before its launch command) of every preset, in order of name."""
    paths = sorted(
        PRESETS.glob("*.toml"), key=lambda path: (not path.stem.startswith("demo"), path.stem)
    )
    return {
        path.stem: path.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ").split(": ")[0]
        for path in paths
    }
