"""What the tests of several conversions share: commands, weights, Meta's directories, adapters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import convert
from minillama.checkpoint.hf_reader import open_weights
from minillama.llama_config import LlamaConfig
from tests.conftest import TINY

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"  # PEFT's name


def run_convert(*words: str | Path) -> None:
    """Run convert.py with these words, in this process."""
    convert.main([str(word) for word in words])


def read_weights(directory: Path) -> dict[str, Tensor]:
    return {name: tensor.read() for name, tensor in open_weights(directory).items()}


def save_meta(directory: Path, shards: list[dict[str, Tensor]], **params: Any) -> Path:
    """Write consolidated.*.pth as torch writes them, and TINY's params.json with changes."""
    directory.mkdir(exist_ok=True)
    for number, shard in enumerate(shards):
        torch.save(shard, directory / f"consolidated.{number:02d}.pth")
    content = {
        "dim": TINY.dim,
        "n_layers": TINY.n_layers,
        "n_heads": TINY.n_heads,
        "n_kv_heads": TINY.n_kv_heads,
        "norm_eps": 1e-5,
        "vocab_size": -1,
    }
    (directory / "params.json").write_text(json.dumps(content | params))
    return directory


def random_meta(config: LlamaConfig = TINY) -> dict[str, Tensor]:
    """Meta's names and shapes, written out, with random values."""
    C, F, V = config.dim, config.ffn_dim, config.vocab_size
    kv = config.n_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (V, C),
        "norm.weight": (C,),
        "output.weight": (V, C),
        "rope.freqs": (config.head_dim // 2,),
    }
    for i in range(config.n_layers):
        shapes |= {
            f"layers.{i}.attention.wq.weight": (C, C),
            f"layers.{i}.attention.wk.weight": (kv, C),
            f"layers.{i}.attention.wv.weight": (kv, C),
            f"layers.{i}.attention.wo.weight": (C, C),
            f"layers.{i}.feed_forward.w1.weight": (F, C),
            f"layers.{i}.feed_forward.w2.weight": (C, F),
            f"layers.{i}.feed_forward.w3.weight": (F, C),
            f"layers.{i}.attention_norm.weight": (C,),
            f"layers.{i}.ffn_norm.weight": (C,),
        }
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def peft_adapter(
    base: Path, directory: Path, safe: bool = True, rows: int = 0, seed: int = 0, **lora: Any
) -> Any:
    """Save an adapter with random factors by peft; return peft's model."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(base, torch_dtype="auto")
    if rows:
        model.resize_token_embeddings(rows)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": LINEARS} | lora
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            values = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data = values.to(parameter.dtype)
    model.save_pretrained(directory, safe_serialization=safe, save_embedding_layers=False)
    return model


def plain_adapter(
    directory: Path, tensors: dict[str, Tensor], file: str = "adapter_model.bin", **config: Any
) -> Path:
    """Write an adapter of rank 2 and alpha 4: s = 2."""
    directory.mkdir()
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
    (directory / "adapter_config.json").write_text(json.dumps(content))
    torch.save(tensors, directory / file)
    return directory


def factors(
    key: str = Q_PROJ, rows: int = 24, columns: int = 24, middle: str = "", r: int = 2
) -> dict[str, Tensor]:
    """Random A (r, columns) and B (rows, r) of one module, under PEFT's names."""
    generator = torch.Generator().manual_seed(len(key))
    return {
        f"{key}.lora_A{middle}.weight": torch.randn(r, columns, generator=generator),
        f"{key}.lora_B{middle}.weight": torch.randn(rows, r, generator=generator),
    }


def product(tensors: dict[str, Tensor], key: str = Q_PROJ) -> Tensor:
    """B·A of one module."""
    return tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
