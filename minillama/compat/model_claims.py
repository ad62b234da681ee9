"""Flags of AscendSpeed and Megatron that describe the model: they are compared with it.

There they make the model; here config.json of the checkpoint does. So a flag that is true of the
checkpoint is accepted, and one that is not is an error: it was written for another model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from minillama.errors import UserError
from minillama.hf_config import published
from minillama.llama_config import LlamaConfig

# flag -> the field of the config that must have its value
NUMBERS = {
    "layernorm_epsilon": "norm_eps",
    "norm_epsilon": "norm_eps",
    "rotary_base": "rope_theta",
    "pad_vocab_size_to": "vocab_size",
    "padded_vocab_size": "vocab_size",
}
DIVISOR = "make_vocab_size_divisible_by"
TYPE = "type"
SWITCHES = (
    "untie_embeddings_and_output_weights",
    "disable_bias_linear",
    "group_query_attention",
)


def describes_model(flags: Mapping[str, Any]) -> bool:
    """Tell whether flags say something about the model that only its config.json can answer."""
    names = (*NUMBERS, DIVISOR, TYPE, *SWITCHES)
    return any(flags.get(name) is not None for name in names)


def refuse_other_model(
    flags: Mapping[str, Any], llama: LlamaConfig, tensor_parallel: int = 1
) -> None:
    """Raise UserError for a flag that describes another model than `llama`, the one to train."""
    reasons = {
        "untie_embeddings_and_output_weights": "its head is its embedding",
        "disable_bias_linear": "its linear layers have biases",
        "group_query_attention": f"each of its {llama.n_heads} query heads has a key/value head of "
        "its own; --n_kv_heads N groups them",
    }
    is_wrong = {
        "untie_embeddings_and_output_weights": llama.tie_embeddings,
        "disable_bias_linear": llama.attention_bias or llama.mlp_bias,
        "group_query_attention": llama.n_kv_heads == llama.n_heads,
    }
    for name in SWITCHES:
        if flags.get(name) is not None and is_wrong[name]:
            raise _other_model(name, reasons[name])
    for name, field in NUMBERS.items():
        if flags.get(name) is not None:
            _compare_number(name, _value(flags[name]), getattr(llama, field))
    if flags.get(DIVISOR) is not None:
        _compare_divisor(_value(flags[DIVISOR]), llama.vocab_size, tensor_parallel)
    if flags.get(TYPE):
        size = published(size_of(_value(flags[TYPE])))
        if (size.n_layers, size.dim) != (llama.n_layers, llama.dim):
            shape = f"it has {llama.n_layers} layers of width {llama.dim}"
            raise _other_model(f"{TYPE} {_value(flags[TYPE])}", shape)


def size_of(type_name: str) -> str:
    """Return our name of a size that AscendSpeed calls 7B, 30B or llama2-70B."""
    size = type_name.lower().removeprefix("llama2-").removeprefix("llama-")
    return "33b" if size == "30b" else size


def _compare_number(name: str, text: str, actual: float) -> None:
    try:
        number = float(text)
    except ValueError:
        raise UserError(f"--{name} {text}: expected a number") from None
    if number != actual:
        raise _other_model(f"{name} {text}", f"it has {actual:g}")


def _compare_divisor(text: str, num_rows: int, tensor_parallel: int) -> None:
    """AscendSpeed adds rows until this, times the tensor ranks, divides them; not so here."""
    if not text.isdecimal() or text == "0":
        raise UserError(f"--{DIVISOR} {text}: expected a whole number above 0")
    multiple = int(text) * tensor_parallel
    if num_rows % multiple:
        reason = f"{multiple} does not divide its {num_rows} rows, and none are added here"
        raise _other_model(f"{DIVISOR} {text}", reason)


def _value(words: Sequence[str]) -> str:
    return " ".join(words)


def _other_model(flag: str, reason: str) -> UserError:
    return UserError(f"--{flag} describes another model: {reason}; leave the flag out")
