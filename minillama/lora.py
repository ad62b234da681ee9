"""LoRA: train two thin matrices beside each frozen one (Hu et al. 2021).

    y = x W^T + s (x A^T) B^T        A (R, in) drawn at random, B (out, R) zero, s = alpha / R  (rsLoRA: alpha / sqrt(R))

B starts at zero, so tuning starts from the very model it was given; W never changes, so no gradient and no optimizer state is kept
for it. Merging adds s B A to W, once, in fp32. `add_lora` changes a finished model from outside: each named linear is replaced by
one that shares its weight. The factors are fp32 whatever the model's dtype.

Adapters are PEFT's directories, both ways: adapter_config.json and adapter_model.safetensors. A key of the configuration that
would change the arithmetic and is not known here is refused; a tensor that fits nowhere is an error, never skipped.
"""

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minillama import ops
from minillama.errors import UserError, closest, parsing, read_json

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What Megatron and AscendSpeed call them; their fused modules are several of ours.
MEGATRON = {
    "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "dense": ("o_proj",),
    "proj": ("gate_proj", "up_proj"),
    "dense_h_to_4h": ("up_proj",),
    "dense_4h_to_h": ("down_proj",),
    "word_embeddings": ("embed_tokens",),
    "lm_head.lm_head": ("lm_head",),
    "all": LINEARS,
}
WHOLE = {
    "embed_tokens": "model.embed_tokens",
    "lm_head": "lm_head",
}  # what modules_to_save may name, and where it is
# Keys that change the arithmetic, with the values at which they do nothing. Other init_lora_weights (pissa, olora, loftq, …) also
# change the base weights, which an adapter's file does not hold.
MUST_BE = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    **dict.fromkeys(
        ("use_dora", "fan_in_fan_out", "use_qalora", "lora_bias", "use_bdlora"), (False, None)
    ),
    **dict.fromkeys(
        (
            "layers_to_transform",
            "layer_replication",
            "trainable_token_indices",
            "target_parameters",
            "exclude_modules",
            "enable_lora",
            "alora_invocation_tokens",
            "arrow_config",
            "kasa_config",
            "monteclora_config",
        ),
        (None,),
    ),
}


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter is; `patterns` give some modules a rank or alpha of their own."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    modules_to_save: tuple[str, ...] = ()
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        alpha, rank = _by_pattern(self.alpha_pattern, module, self.alpha), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


class LoraLinear(nn.Linear):
    """A linear that shares a frozen weight (out, in) and adds s (x A^T) B^T; the factors are fp32."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__(
            base.in_features, base.out_features, bias=base.bias is not None, device="meta"
        )
        self.weight, self.bias, self.scale, self.plain_class = (
            base.weight,
            base.bias,
            scale,
            type(base),
        )
        fp32 = {"dtype": torch.float32, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **fp32))  # (R, in)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **fp32))  # (out, R)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = ops.linear(x, self.weight, self.bias)
        low = self.dropout(x).float() @ self.lora_A.T  # (..., R)
        return y + (low @ (self.scale * self.lora_B.T)).to(y.dtype)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + s B A in fp32, rounded once to W's dtype."""
        return (self.weight.float() + self.scale * (self.lora_B @ self.lora_A)).to(
            self.weight.dtype
        )

    def plain(self, weight: Tensor) -> nn.Linear:
        """A linear without adapter, of the class that this one was made from."""
        plain = self.plain_class(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return plain


def resolve_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Module names with Megatron's spellings and `all` replaced by ours, in order, once each."""
    return tuple(dict.fromkeys(ours for name in names for ours in MEGATRON.get(name, (name,))))


def add_lora(
    model: nn.Module, config: LoraConfig, generator: torch.Generator | None = None
) -> None:
    """Freeze `model` and give each linear named in config.targets an adapter; modules_to_save stay trainable, whole.
    A is drawn from U(-1/sqrt(in), 1/sqrt(in)), as PEFT does. Raises UserError for a target that names no linear."""
    model.requires_grad_(False)
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) is not LoraLinear and isinstance(module, nn.Linear)
    }
    for target in config.targets:
        if not any(_named(name, target) for name in linears):
            known = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise UserError(
                f"lora_targets: {target!r} names no linear of this model{closest(target, known)}; linears: {', '.join(known)}"
            )
    for name, linear in linears.items():
        if any(_named(name, target) for target in config.targets):
            adapted = LoraLinear(
                linear, config.rank_of(name), config.scale_of(name), config.dropout
            )
            nn.init.kaiming_uniform_(adapted.lora_A, a=math.sqrt(5), generator=generator)
            model.set_submodule(name, adapted)
    for name in config.modules_to_save:
        if name not in WHOLE:
            raise UserError(
                f"modules_to_save: {name!r}{closest(name, WHOLE)}; choose from {', '.join(WHOLE)}"
            )
        model.get_submodule(WHOLE[name]).requires_grad_(True)
    tied = model.get_submodule("lm_head").weight is model.get_submodule("model.embed_tokens").weight
    if tied and len(set(config.modules_to_save)) == 1:
        raise UserError(
            f"modules_to_save: {config.modules_to_save[0]} alone cannot be trained whole: this model's embedding and "
            "head are tied; name both, embed_tokens,lm_head"
        )


def merge_lora(model: nn.Module) -> None:
    """Add every adapter to its weight and put plain linears back."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            model.set_submodule(name, module.plain(module.merged_weight()))


def adapter_weights(model: nn.Module, config: LoraConfig) -> dict[str, nn.Parameter]:
    """What an adapter's file holds, by the name in the file without PEFT's `base_model.model.`: factors, and modules trained whole."""
    factors = {
        f"{name}.{factor}.weight": getattr(module, factor)
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear)
        for factor in ("lora_A", "lora_B")
    }
    return factors | {
        f"{WHOLE[name]}.weight": model.get_submodule(WHOLE[name]).weight
        for name in config.modules_to_save
    }


def save_adapter(model: nn.Module, config: LoraConfig, directory: Path, base: str) -> None:
    """Write a PEFT adapter directory. base: where its base model is, for adapter_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name}": weight.detach().to(
            "cpu", copy=True
        )  # a tied head too: safetensors keeps no shared storage
        for name, weight in adapter_weights(model, config).items()
    }
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    pattern = config.targets[0]
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": pattern[3:] if pattern.startswith("re:") else list(config.targets),
        "modules_to_save": list(config.modules_to_save) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": config.use_rslora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (directory / "adapter_config.json").write_text(
        json.dumps(about, indent=2) + "\n", encoding="utf-8"
    )


def read_adapter_config(directory: Path, honoured: tuple[str, ...] = ()) -> tuple[LoraConfig, str]:
    """(configuration, base model) of a PEFT adapter directory. Raises UserError for what would change the arithmetic.
    honoured: keys that the caller sees to by itself."""
    path = directory / "adapter_config.json"
    raw = read_json(
        path, "an adapter is a directory with adapter_config.json and adapter_model.safetensors"
    )
    for key, harmless in MUST_BE.items():
        if key in raw and raw[key] not in harmless and key not in honoured:
            raise UserError(
                f"{path}: {key} = {raw[key]!r} is not supported; merge the adapter with peft, and use the result"
            )
    targets = raw.get("target_modules") or []
    with parsing(path):
        config = LoraConfig(
            rank=int(raw["r"]),
            alpha=float(raw["lora_alpha"]),
            dropout=float(raw.get("lora_dropout") or 0.0),
            targets=(f"re:{targets}",) if isinstance(targets, str) else tuple(sorted(targets)),
            modules_to_save=tuple(raw.get("modules_to_save") or ()),
            use_rslora=bool(raw.get("use_rslora")),
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
        )
    return config, raw.get("base_model_name_or_path") or ""


def load_adapter(model: nn.Module, directory: Path, dropout: float | None = None) -> LoraConfig:
    """Add the adapter in a PEFT directory to `model`, unmerged; returns its configuration.
    dropout: in place of the one it was trained with. Every tensor must fit exactly one place, and every place get its tensor."""
    config, _ = read_adapter_config(directory)
    config = config if dropout is None else replace(config, dropout=dropout)
    path = directory / "adapter_model.safetensors"
    try:
        tensors = {
            name.removeprefix("base_model.model.")
            .replace(".default.", ".")
            .replace(".modules_to_save.", "."): tensor
            for name, tensor in load_file(path).items()
        }  # without PEFT's wrapper and adapter name, which a training state has too
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(
            f"{path}: not a safetensors file, or cut short, or missing ({error}); download it again"
        ) from None
    add_lora(model, config)
    places = adapter_weights(model, config)
    problems = [f"{name} fits no module" for name in tensors if name not in places]
    problems += [f"{name} is missing" for name in places if name not in tensors]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, the model wants {tuple(place.shape)}"
        for name, place in places.items()
        if name in tensors and tensors[name].shape != place.shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(f"{path}: does not fit this model: {'; '.join(problems[:4])}{more}")
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(tensors[name])
    return config


def _named(module: str, target: str) -> bool:
    """PEFT's rule: the name or a dotted tail of it; `re:…`, which PEFT writes as a plain string, must match the whole."""
    if target.startswith("re:"):
        return re.fullmatch(target[3:], module) is not None
    return module == target or module.endswith(f".{target}")


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    return next(
        (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default
    )
