"""The settings of a training run: one table. `presets` fills it.

Each row of `TrainConfig` is a key: its section, default, help text and limits. From this table come
the flags of train.py and their `--help`, the checks of TOML files, and train_config.json:

    default  <  preset or file (--config)  <  flag          the later one wins

A key that is not in the table and a value of the wrong type are errors. An unknown key names the
closest known one, so a misspelt key never silently keeps its default.
"""

import dataclasses
from functools import partial
from typing import Any

from minillama.errors import UserError, closest

DEVICES = ("auto", "cpu", "cuda", "npu", "mlu", "tpu")
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # torch's names -> ours
DATA_FORMATS = (
    "auto",
    "alpaca",
    "sharegpt",
    "messages",
    "moss",
    "ascend",
    "completion",
    "text",
    "lines",
)
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
UNLIMITED = 2**63


@dataclasses.dataclass(frozen=True)
class Key:
    """One row of the table. A number must be at least `minimum` and below `below`."""

    section: str
    default: Any
    help: str
    choices: tuple[Any, ...] = ()  # the only values; empty: any
    minimum: float = 0
    below: float = UNLIMITED

    def check(self, name: str, value: Any) -> None:
        """Raise UserError for a value that is not one of the choices or is outside the limits."""
        if self.choices and value not in self.choices:
            choices = [str(choice) for choice in self.choices]
            hint = closest(str(value), choices)
            raise UserError(f"{name} = {value!r}{hint}; choose one of: {', '.join(choices)}")
        if not isinstance(value, int | float) or self.minimum <= value < self.below:
            return
        lower = f"be at least {self.minimum}" if self.minimum else "not be negative"
        upper = "be finite" if self.below == UNLIMITED else f"be below {self.below}"
        raise UserError(f"{name} = {value}: must {lower}, and {upper}; it is: {self.help}")


def key(
    section: str,
    default: Any,
    help: str,
    choices: tuple[Any, ...] = (),
    minimum: float = 0,
    below: float = UNLIMITED,
) -> Any:
    """Return a dataclass field that holds a `Key`."""
    row = Key(section, default, help, choices, minimum, below)
    return dataclasses.field(default=default, metadata={"key": row})


SECTIONS = ("model", "data", "lora", "train", "parallel")
model_key = partial(key, "model")
data_key = partial(key, "data")
lora_key = partial(key, "lora")
train_key = partial(key, "train")
parallel_key = partial(key, "parallel")


# fmt: off
@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Every key of a run. What 0 and an empty value mean, the help says."""

    ckpt: str = model_key("", "start from this checkpoint, a Hugging Face LLaMA directory")
    init: str = model_key("pretrained", "where the weights come from", ("pretrained", "scratch"))
    model: str = model_key("",
        "architecture to train from scratch: a published size (7b, 13b, 70b, …) or a config.json")
    tokenizer: str = model_key("", "tokenizer.model or tokenizer.json (empty: the checkpoint's)")
    n_layers: int = model_key(0,
        "number of layers; of a checkpoint or a published size: only the first N (0: all)")
    dim: int = model_key(0, "model width, from scratch (0: the width of `model`)")
    n_heads: int = model_key(0, "query heads, from scratch")
    n_kv_heads: int = model_key(0, "key/value heads, from scratch")
    ffn_dim: int = model_key(0, "MLP width, from scratch")
    vocab_size: int = model_key(0, "vocabulary size, from scratch (0: the tokenizer's)")
    context: int = model_key(0, "longest sequence the model is made for, from scratch")
    initializer_range: float = model_key(0.02, "standard deviation of the initial weights")

    data: tuple[str, ...] = data_key((),
        "training data: files, folders, names in dataset_info.json, prefixes of `convert.py data`")
    eval_data: tuple[str, ...] = data_key((), "validation data, in the same forms")
    validation_split: float = data_key(0.0,
        "fraction of the training documents to validate on, without eval_data", below=1)
    dataset_dir: str = data_key("data", "folder of dataset_info.json, which names data sets")
    data_format: str = data_key("auto", "format of raw files", DATA_FORMATS)
    template: str = data_key("",
        "prompt template (empty: the checkpoint's, else vicuna_v1.1 for sharegpt, alpaca, or none)")
    packing: bool = data_key(True,
        "fill each sequence with several documents up to max_length; false: one document each")
    max_length: int = data_key(0,
        "longest sequence in tokens; longer ones are cut (0: the model's context, at most 1024)")
    append_eod: bool = data_key(True, "end each training document with the EOS token")
    skip_bad_records: bool = data_key(False, "leave malformed records out, and count and list them")
    max_samples: int = data_key(0, "records read of each raw file, from its beginning (0: all)")
    max_dropped: float = data_key(0.1, "largest share of documents left out: no target", below=1)
    grow_vocabulary: bool = data_key(False, "grow the embeddings to a larger tokenizer's size")
    workers: int = data_key(1, "processes that tokenize", minimum=1)
    cache_dir: str = data_key("", "folder of tokenized raw files (empty: ~/.cache/minillama)")

    lora: bool = lora_key(False,
        "train low-rank adapters instead of the weights; any key below turns it on")
    lora_rank: int = lora_key(8, "rank R of the adapters", minimum=1)
    lora_alpha: float = lora_key(0.0, "adapters are scaled by alpha / rank (0: twice the rank)")
    lora_dropout: float = lora_key(0.0, "dropout on the adapters' input", below=1)
    lora_targets: tuple[str, ...] = lora_key(("q_proj", "v_proj"),
        "names of the linear layers that get an adapter, or `all`")
    modules_to_save: tuple[str, ...] = lora_key((),
        "modules trained in full beside the adapters: embed_tokens, lm_head")
    use_rslora: bool = lora_key(False, "scale by alpha / sqrt(rank)")
    adapter: str = lora_key("", "start from this PEFT adapter directory")

    num_train_epochs: float = train_key(3.0, "passes over the data (0.5: half)", minimum=0.001)
    max_steps: int = train_key(0, "stop after this many updates (0: after num_train_epochs)")
    per_device_train_batch_size: int = train_key(8, "sequences in a rank's micro-batch", minimum=1)
    per_device_eval_batch_size: int = train_key(8, "sequences a rank evaluates together", minimum=1)
    gradient_accumulation_steps: int = train_key(1,
        "micro-batches that a rank adds up before an update", minimum=1)
    learning_rate: float = train_key(5e-5, "peak learning rate")
    min_learning_rate: float = train_key(0.0, "learning rate where cosine and linear schedules end")
    lr_scheduler_type: str = train_key("linear", "schedule after warm-up", SCHEDULES)
    warmup_ratio: float = train_key(0.0, "fraction of the updates spent warming up", below=1)
    warmup_steps: int = train_key(0, "updates spent warming up; wins over warmup_ratio")
    weight_decay: float = train_key(0.0, "decay of matrices; norms and biases never decay")
    adam_beta1: float = train_key(0.9, "AdamW's first-moment decay", below=1)
    adam_beta2: float = train_key(0.999, "AdamW's second-moment decay", below=1)
    adam_epsilon: float = train_key(1e-8, "AdamW's epsilon")
    max_grad_norm: float = train_key(1.0, "clip the global gradient norm to this (0: do not)")
    gradient_checkpointing: bool = train_key(False,
        "recompute activations in backward: less memory, more time")
    precision: str = train_key("fp32",
        "dtype of the computation; trained weights keep fp32 masters", tuple(PRECISIONS.values()))
    initial_scale_power: int = train_key(16,
        "fp16: the loss is first multiplied by 2 to this power", below=128)
    loss_scale_window: int = train_key(1000, "fp16: updates before the loss scale is doubled")
    loss_scale_hysteresis: int = train_key(2, "fp16: overflows before the loss scale is halved")
    min_loss_scale: float = train_key(1.0,
        "fp16: the smallest loss scale; an overflow there stops the run")
    tf32: bool = train_key(False, "let cuda round the inputs of fp32 products to TF32")
    seed: int = train_key(42, "seed of the initial weights, the order of the data and dropout")
    out_dir: str = train_key("", "run directory (empty: runs/PRESET)")
    logging_steps: int = train_key(10, "updates between records of metrics.jsonl", minimum=1)
    eval_strategy: str = train_key("no", "when to evaluate", ("no", "steps", "epoch"))
    eval_steps: int = train_key(100, "updates between evaluations", minimum=1)
    save_strategy: str = train_key("steps", "when to save a checkpoint", ("no", "steps", "epoch"))
    save_steps: int = train_key(500, "updates between checkpoints", minimum=1)
    save_total_limit: int = train_key(0, "newest checkpoints that are kept (0: all)")
    resume: str = train_key("auto",
        "auto: continue from the newest checkpoint in out_dir; none; or a checkpoint directory")
    plot_loss: bool = train_key(False,
        "fail if loss.png cannot be drawn (it is drawn if matplotlib is installed)")
    peak_tflops: float = train_key(0.0,
        "the device's peak TFLOP/s, to report model-FLOPs utilisation against")
    device: str = train_key("auto", "device", DEVICES)
    ops: str = train_key("",
        "implementations of the ops: reference, fused, auto, …, or by op: rms_norm=reference")
    threads: int = train_key(0, "CPU threads of a rank (0: by the model's size)", below=1025)

    tensor_parallel: int = parallel_key(1,
        "ranks that cut each layer and its weights among them", minimum=1)
    pipeline_parallel: int = parallel_key(1,
        "stages: ranks that hold consecutive layers of one model", minimum=1)
    devices: str = parallel_key("",
        "devices of this process, which share out the layers: 2, or npu:0,npu:1 (empty: one)")
    zero_stage: int = parallel_key(0,
        "what is sharded over ranks: 1 the optimizer's state, 2 the gradients too", (0, 1, 2))
    reduction: str = parallel_key("fast", "order in which gradients are summed", ("exact", "fast"))
    bucket_elements: int = parallel_key(10_000_000, "gradient elements in a reduction", minimum=1)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            KEYS[name].check(name, value)
# fmt: on


KEYS: dict[str, Key] = {
    field.name: field.metadata["key"] for field in dataclasses.fields(TrainConfig)
}


def parse_list(text: str) -> tuple[str, ...]:
    """Return the parts of a comma-separated list."""
    parts = [part.strip() for part in text.split(",")]
    return tuple(part for part in parts if part)
