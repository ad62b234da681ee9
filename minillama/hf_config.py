"""Reads and writes Hugging Face's `config.json`, as transformers 4 and 5 spell it.

Two numbers of a LLaMA, `rope_theta` and `norm_eps`, cannot be read from the weights. With a wrong
value the model runs without an error, but predicts worse. They are read from the checkpoint's own
file and never guessed from a size or a path. A `config.json` that asks for something this network
does not do is refused by key and value.

This module leaves out sliding windows, experts, quantized weights and attention dropout.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from minillama.errors import UserError, closest
from minillama.files import parsing, read_json
from minillama.hub import hub_hint
from minillama.llama_config import PUBLISHED, LlamaConfig, RopeScaling, is_whole
from minillama.output_directory import final_hint, restore

# Our names of the numbers, and those of Hugging Face's config.json.
HF_NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "ffn_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "bos_id": "bos_token_id",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "initializer_range": "initializer_range",
}
REQUIRED = ("dim", "n_layers", "n_heads", "ffn_dim", "vocab_size", "norm_eps")

# Keys of other networks, and the only value that this network has. None: the key must be absent.
SUPPORTED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_dropout": 0,
    "partial_rotary_factor": 1,
    "num_experts": 0,
    "num_local_experts": 0,
    "sliding_window": None,
    "quantization_config": None,
}

# What each kind of rotary scaling needs beside its factor.
ROPE_KINDS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "llama3": ("original_max_seq_len", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "original_max_seq_len",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


def published(name: str) -> LlamaConfig:
    """The config of a published size ("7b"), or of a `config.json` (the file or its directory)."""
    if name.lower() in PUBLISHED:
        return PUBLISHED[name.lower()]
    if Path(name).exists():
        return read_config(Path(name))
    raise UserError(
        f"model {name!r} is neither a published size nor a config.json{closest(name, PUBLISHED)}; "
        f"known sizes: {', '.join(PUBLISHED)}"
    )


def stop_ids(directory: Path, config: LlamaConfig) -> tuple[int, ...]:
    """The ids that end a text: those of config.json and of generation_config.json."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return config.eos_ids
    with parsing(path):
        eos_ids = _token_ids("eos_token_id", read_json(path).get("eos_token_id"))
    return tuple(dict.fromkeys([*config.eos_ids, *eos_ids]))


def read_config(path: Path) -> LlamaConfig:
    """Read `config.json`, given as the file or the directory that holds it."""
    restore(path)
    hint = hub_hint(path) + final_hint(path, "config.json")
    if path.is_dir():
        path = path / "config.json"
    remedy = f"a checkpoint is a directory with config.json and model*.safetensors{hint}"
    return from_hf(read_json(path, remedy), path)


def from_hf(raw: dict[str, Any], path: Path | str = "") -> LlamaConfig:
    """The content of a `config.json` as a `LlamaConfig`. `path` names the file in errors.

    Raises UserError for what this network cannot do, by key and value.
    """
    with parsing(path):
        _check_supported(raw)
        values: dict[str, Any] = {}
        for name, hf_name in HF_NAMES.items():
            if raw.get(hf_name) is not None:
                values[name] = raw[hf_name]
        for name in REQUIRED:
            if name not in values:
                raise UserError(
                    f"key {HF_NAMES[name]!r} is missing; is this the config.json of a LLaMA?"
                )
        values.setdefault("n_kv_heads", values["n_heads"])
        if "head_dim" not in values:
            values["head_dim"] = values["dim"] // values["n_heads"]
        values.setdefault("max_seq_len", 2048)
        values["norm_eps"] = float(values["norm_eps"])
        values["rope_theta"], values["rope_scaling"] = _read_rope(raw)
        values["eos_ids"] = _token_ids("eos_token_id", raw.get("eos_token_id", 2))  # LLaMA's is 2
        return LlamaConfig(**values)


def _check_supported(raw: dict[str, Any]) -> None:
    for key, value in SUPPORTED.items():
        if raw.get(key) not in (value, None):
            supported = "no such key" if value is None else repr(value)
            raise UserError(f"{key} = {raw[key]!r} is not supported (supported: {supported})")
    layer_types = raw.get("layer_types") or []
    if any(kind != "full_attention" for kind in layer_types):
        raise UserError(
            f"layer_types = {layer_types!r} is not supported (supported: 'full_attention')"
        )


def _token_ids(key: str, value: Any) -> tuple[int, ...]:
    """The token ids of a key, which may be a number, a list of numbers, or null."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    for token in ids:
        if not is_whole(token, minimum=0):
            raise UserError(f"{key} = {value!r}: expected token ids, whole numbers from 0")
    return tuple(ids)


def _read_rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of a `config.json`.

    transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`.
    """
    old = _rope_keys(raw, "rope_scaling")
    new = _rope_keys(raw, "rope_parameters")
    if raw.get("rope_theta") is not None:
        old["rope_theta"] = raw["rope_theta"]
    for key in old.keys() & new.keys():
        if old[key] != new[key]:
            raise UserError(
                f"{key} is {old[key]!r} in the keys of transformers 4, {new[key]!r} in "
                "rope_parameters; leave one of them out"
            )
    spec = old | new
    theta = float(spec.pop("rope_theta", 10000.0))
    kind = spec.pop("rope_type", "default")
    if kind == "default":
        return theta, None
    if kind not in ROPE_KINDS:
        supported = ", ".join(ROPE_KINDS)
        raise UserError(f"rope scaling {kind!r} is not supported (supported: {supported})")
    needed = ["factor"]
    if kind == "llama3":
        needed.append("original_max_position_embeddings")
    for key in needed:
        if not float(spec.get(key) or 0) > 0:
            raise UserError(f"rope scaling {kind!r} has no {key} above 0 (found {spec.get(key)})")
    values = {}
    for key, value in spec.items():
        values[key.replace("max_position_embeddings", "max_seq_len")] = value
    known = {field.name for field in fields(RopeScaling)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError(f"rope scaling {kind!r}: unknown key {unknown}")
    values["factor"] = float(values["factor"])
    return theta, RopeScaling(kind, **values)


def _rope_keys(raw: dict[str, Any], table: str) -> dict[str, Any]:
    """The keys of rope_scaling or rope_parameters that have a value; `type` is `rope_type`."""
    content = raw.get(table) or {}
    if not isinstance(content, dict):
        raise UserError(f"{table} = {content!r}: expected an object, such as {{}}")
    keys = {key: value for key, value in content.items() if value is not None}
    old_kind = keys.pop("type", None)
    if old_kind is not None:
        keys.setdefault("rope_type", old_kind)
    return keys


def to_hf(config: LlamaConfig, dtype: str = "float32") -> dict[str, Any]:
    """`config.json` as transformers 4 writes it, and transformers 4 and 5 read it."""
    raw: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    }
    for name, hf_name in HF_NAMES.items():
        raw[hf_name] = getattr(config, name)
    raw["rope_scaling"] = _write_rope(config.rope_scaling)
    eos_ids = list(config.eos_ids)
    raw["eos_token_id"] = eos_ids[0] if len(eos_ids) == 1 else eos_ids or None
    raw["torch_dtype"] = dtype
    raw["use_cache"] = True
    return raw


def _write_rope(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    spec: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    for name in ROPE_KINDS[scaling.kind]:
        value = getattr(scaling, name)
        if value is not None:
            spec[name.replace("max_seq_len", "max_position_embeddings")] = value
    return spec
