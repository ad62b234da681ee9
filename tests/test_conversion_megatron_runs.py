"""Checkpoints of Megatron's training runs: their weights are taken, nothing in them is executed."""

import argparse
import enum
import os
import random
import shutil
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import minillama
from minillama.errors import UserError
from minillama.llama_config import LlamaConfig
from minillama.peft_adapters import read_adapter
from minillama.torch_files import Unknown, map_state
from tests.conftest import TINY, random_model
from tests.megatron import assert_same_weights, leaves, save_weights

GQA = replace(TINY, n_heads=8, n_kv_heads=4, head_dim=4, dim=32, ffn_dim=44)


class ModelType(enum.Enum):
    encoder_or_decoder = 1


@pytest.fixture
def source(tmp_path: Path) -> Path:
    weights = dict(random_model(**vars(GQA)).named_parameters())
    return save_weights(tmp_path / "hf", GQA, weights)


def save_run(release: Path, directory: Path, iteration: int) -> Path:
    """Write a release again as a training run saves its checkpoint: with settings, optimizer, and
    random states, and without the empty dictionaries of a stage."""
    folder = directory / f"iter_{iteration:07d}"
    arguments = argparse.Namespace(
        num_layers=2, params_dtype=torch.bfloat16, model_type=ModelType.encoder_or_decoder
    )
    for path in (release / "release").rglob("*.pt"):
        content = torch.load(path, weights_only=True)
        model: dict[str, Any] = {}
        for name, value in leaves(content["model"]):
            *keys, last = name.split("/")
            if isinstance(value, Tensor):
                inner = model
                for key in keys:
                    inner = inner.setdefault(key, {})
                inner[last] = value
        state = {
            "args": arguments,
            "checkpoint_version": 3.0,
            "iteration": iteration,
            "model": model,
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
        }
        (folder / path.parent.name).mkdir(parents=True)
        torch.save(state, folder / path.parent.name / path.name)
    (directory / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return directory


def test_a_training_checkpoint_becomes_a_hugging_face_directory(
    source: Path, tmp_path: Path
) -> None:
    cut = {"tensor_parallel": 2, "pipeline_parallel": 2, "vocab_multiple": 4}
    minillama.megatron(source, tmp_path / "release", **cut)
    run = save_run(tmp_path / "release", tmp_path / "run", 200)
    for directory in (run, run / "iter_0000200"):
        written = minillama.from_megatron(
            directory, tmp_path / "back", config=source, overwrite=True
        )
        assert "iter_0000200, a step of a training run, only the weights are taken" in str(written)
        assert_same_weights(tmp_path / "back", source)
    state = map_state(next((run / "iter_0000200").rglob("*.pt")))
    arguments = state.others["args"]
    assert isinstance(arguments, Unknown)
    assert arguments.state["num_layers"] == 2
    assert arguments.state["params_dtype"] is torch.bfloat16
    assert isinstance(arguments.state["model_type"], Unknown)


class Mischief:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_a_function_in_a_training_checkpoint_is_not_called(tmp_path: Path) -> None:
    evidence = tmp_path / "evidence"
    copying = Mischief(shutil.copyfile, __file__, str(evidence))
    state = {"model": {"w": torch.ones(2)}, "args": copying}
    torch.save(state, tmp_path / "w.pt")
    assert map_state(tmp_path / "w.pt").weights.keys() == {"w"}
    assert not evidence.exists()


@pytest.mark.parametrize("call", [(os.system, "true"), (bytearray, 2**40)])
def test_what_torch_calls_itself_or_blocks_is_refused(tmp_path: Path, call: Any) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "args": Mischief(*call)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="nothing was executed"):
        map_state(tmp_path / "w.pt")


@pytest.fixture
def torch_npu() -> Iterator[Any]:
    """A module under the name by which torch_npu pickles tensors."""
    name = "torch_npu.utils.storage"

    def _rebuild_npu_tensor(*arguments: Any) -> None:
        raise AssertionError("was called")

    module: Any = types.ModuleType(name)
    _rebuild_npu_tensor.__module__ = name
    _rebuild_npu_tensor.__qualname__ = "_rebuild_npu_tensor"
    module._rebuild_npu_tensor = _rebuild_npu_tensor
    packages = {key: types.ModuleType(key) for key in ("torch_npu", "torch_npu.utils")}
    sys.modules.update(packages | {name: module})
    yield module
    for key in (*packages, name):
        del sys.modules[key]


class NpuTensor:
    """Pickles a tensor as torch_npu does: torch's arguments, and the number of a format."""

    def __init__(self, tensor: Tensor, module: Any) -> None:
        self.tensor = tensor
        self.module = module

    def __reduce__(self) -> Any:
        _, arguments = self.tensor.__reduce_ex__(2)
        return self.module._rebuild_npu_tensor, (*arguments, 2)


def test_a_tensor_that_an_npu_saved_is_a_tensor(tmp_path: Path, torch_npu: Any) -> None:
    tensor = torch.arange(6.0).view(2, 3)
    torch.save({"model": {"w": NpuTensor(tensor, torch_npu)}}, tmp_path / "w.pt")
    assert torch.equal(map_state(tmp_path / "w.pt").weights["w"], tensor)


def lora_parts(config: LlamaConfig, ranks: int) -> list[dict[str, Tensor]]:
    """What each rank of a LoRA run of one stage saves, by Megatron's names."""
    generator = torch.Generator().manual_seed(0)

    def sample(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    C, F, D = config.dim, config.ffn_dim, config.head_dim
    parts: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    fused_rows = (config.n_heads + 2 * config.n_kv_heads) * D
    shapes = {  # in, out, and whether the inputs are cut
        "self_attention.query_key_value": (C, fused_rows, False),
        "self_attention.dense": (C, C, True),
        "mlp.gate_proj": (C, F, False),
        "mlp.dense_4h_to_h": (F, C, True),
    }
    for layer in range(config.n_layers):
        for module, (inputs, outputs, is_cut_by_columns) in shapes.items():
            name = f"layers.{layer}.{module}.lora_"
            a = sample(2, inputs)
            b = sample(outputs, 2)
            for rank, part in enumerate(parts):
                part[f"{name}A.default.weight"] = (
                    a.chunk(ranks, 1)[rank] if is_cut_by_columns else a
                )
                part[f"{name}B.default.weight"] = b if is_cut_by_columns else b.chunk(ranks)[rank]
    return parts


def save_lora_run(
    directory: Path, parts: list[dict[str, Tensor]], vocabulary: Tensor, **arguments: float
) -> Path:
    for rank, part in enumerate(parts):
        rows = vocabulary.chunk(len(parts))[rank]
        model = {
            "embedding": {
                "word_embeddings": {
                    "modules_to_save.default.weight": rows,
                    "original_module.weight": torch.zeros_like(rows),
                }
            },
            "encoder": part,
        }
        path = directory / "iter_0000010" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        state = {
            "args": argparse.Namespace(lora_r=2, **arguments),
            "checkpoint_version": 3.0,
            "model": {"language_model": model},
        }
        torch.save(state, path)
    (directory / "latest_checkpointed_iteration.txt").write_text("10")
    return directory


def test_a_lora_run_becomes_an_adapter_that_adds_what_the_run_added(
    source: Path, tmp_path: Path
) -> None:
    """The sum over the ranks of what the fused linear layer adds is what q, k and v add."""
    parts = lora_parts(GQA, ranks=2)
    vocabulary = torch.randn(52, GQA.dim)
    run = save_lora_run(tmp_path / "run", parts, vocabulary, lora_alpha=6)
    minillama.from_megatron(run, tmp_path / "adapter", config=source)
    adapter = read_adapter(tmp_path / "adapter")
    config = adapter.config
    assert (config.rank, config.alpha, config.modules_to_save) == (2, 6.0, ("embed_tokens",))
    targets = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"}
    assert set(config.targets) == targets
    embedding = adapter.whole["model.embed_tokens.weight"].read()
    assert torch.equal(embedding, vocabulary[: GQA.vocab_size])

    products = {}
    for factors in adapter.factors:
        assert factors.scale == 3.0
        products[factors.module] = factors.b.read() @ factors.a.read()
    name = "layers.1.self_attention.query_key_value.lora_{}.default.weight"
    fused = [part[name.format("B")] @ part[name.format("A")] for part in parts]
    by_head = torch.cat(fused).view(GQA.n_kv_heads, 2 + 2, GQA.head_dim, GQA.dim)
    attention = "model.layers.1.self_attn"
    torch.testing.assert_close(products[f"{attention}.q_proj"], by_head[:, :2].flatten(0, 2))
    torch.testing.assert_close(products[f"{attention}.k_proj"], by_head[:, 2].flatten(0, 1))
    torch.testing.assert_close(products[f"{attention}.v_proj"], by_head[:, 3].flatten(0, 1))
    name = "layers.0.mlp.dense_4h_to_h.lora_{}.default.weight"
    columns = [part[name.format("B")] @ part[name.format("A")] for part in parts]
    down = products["model.layers.0.mlp.down_proj"]
    torch.testing.assert_close(down, torch.cat(columns, dim=1))


def test_a_lora_run_that_does_not_fit_is_refused(source: Path, tmp_path: Path) -> None:
    parts = lora_parts(GQA, ranks=2)
    run = save_lora_run(tmp_path / "run", parts, torch.randn(52, GQA.dim), lora_alpha=6)
    with pytest.raises(UserError, match="holds an adapter; from-megatron makes a PEFT directory"):
        minillama.reshard(run, tmp_path / "out", config=source)
    wider = replace(GQA, ffn_dim=64)
    weights = dict(random_model(**vars(wider)).named_parameters())
    base = save_weights(tmp_path / "wider", wider, weights)
    with pytest.raises(UserError, match=r"mlp.gate_proj: B·A is .* --config names another model"):
        minillama.from_megatron(run, tmp_path / "out", config=base)
    name = "layers.0.self_attention.query_key_value.lora_A.default.weight"
    parts[1][name] = parts[1][name] + 1
    other = save_lora_run(tmp_path / "other", parts, torch.randn(52, GQA.dim))
    with pytest.raises(UserError, match=r"q_proj.lora_A.weight: differs between the tensor-paral"):
        minillama.from_megatron(other, tmp_path / "out", config=source, lora_alpha=6)
    with pytest.raises(UserError, match="do not hold the alpha of LoRA; name it with --lora_alph"):
        minillama.from_megatron(other, tmp_path / "out", config=source)
    assert not (tmp_path / "out").exists()
