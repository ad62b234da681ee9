"""NaN and infinity in weights: refused by name before training, and saved nowhere."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillama.checkpoint.hf_reader import load_model
from minillama.checkpoint.hf_writer import save_model
from minillama.comm import Mesh
from minillama.errors import UserError
from minillama.tensor_files import read_safetensors
from minillama.tensor_writers import write_safetensors
from minillama.tokenizer import open_tokenizer
from minillama.training import model_building
from minillama.training.trainer import Trainer, train

MESH = Mesh()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_weights_are_refused_by_name_before_training(
    value: float, settings_for: Callable, inputs: Path, tmp_path: Path
) -> None:
    from minillama.checkpoint.hf_reader import load_model
    from minillama.checkpoint.hf_writer import save_model
    from minillama.tokenizer import open_tokenizer
    from tests.faults.test_run_inputs import change_weights  # noqa: F401

    model = load_model(inputs / "base")
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = value
    save_model(model, tmp_path / "broken", open_tokenizer(inputs / "base"))
    with pytest.raises(UserError, match=r"broken: model.layers.1.mlp.up_proj.weight holds NaN or"):
        train(settings_for(ckpt=str(tmp_path / "broken"), lora=True), MESH)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("max_steps", [1, 3])
def test_a_run_without_any_update_writes_no_final(
    max_steps: int, settings_for: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Trainer, "loss_sum", lambda self, batch: self.model.lm_head.weight.sum() * math.nan
    )
    with pytest.raises(UserError, match=f"none of {max_steps} steps changed the weights"):
        train(settings_for(max_steps=max_steps), MESH)
    assert not (tmp_path / "run/final").exists()
    assert not (tmp_path / "run/summary.json").exists()


def test_weights_that_broke_are_saved_nowhere(
    settings_for: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.update

    def update(self: Trainer, *arguments: object) -> object:
        result = original(self, *arguments)
        if self.step == 3:
            self.model.model.norm.weight.data[0] = math.inf
        return result

    monkeypatch.setattr(Trainer, "update", update)
    config = settings_for(save_strategy="steps", save_steps=1, max_steps=5, save_total_limit=1)
    with pytest.raises(UserError, match=r"after step 5, model.norm.weight holds NaN or infinity"):
        train(config, MESH)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000003"]
    assert not (tmp_path / "run/final").exists()


def test_an_adapter_with_nan_is_refused_by_name(settings_for: Callable, tmp_path: Path) -> None:
    first = settings_for(lora=True, max_steps=1, out_dir=str(tmp_path / "first"))
    train(first, MESH)
    path = tmp_path / "first/final/adapter_model.safetensors"
    tensors = {name: ref.read() for name, ref in read_safetensors(path).items()}
    next(iter(tensors.values()))[0, 0] = math.nan
    write_safetensors(path, tensors)
    adapter = str(tmp_path / "first/final")
    named = r"first/final/adapter_model.*lora_A.* holds NaN or infinity"
    with pytest.raises(UserError, match=named):
        train(settings_for(lora=True, adapter=adapter), MESH)


def test_weights_beyond_fp16_are_refused_though_they_are_finite_in_fp32(
    settings_for: Callable, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(inputs / "base")
    model.lm_head.weight.data[0, 0] = 1e6
    save_model(model, tmp_path / "large", open_tokenizer(inputs / "base"))
    config = settings_for(ckpt=str(tmp_path / "large"), max_steps=1)
    assert train(config, MESH)["steps"] == 1
    monkeypatch.setattr(model_building, "compute_dtype", lambda *_: (torch.float16, ""))
    with pytest.raises(UserError, match=r"lm_head.weight holds NaN or infinity \(in torch.float16"):
        train(replace(config, precision="fp16"), MESH, overwrite=True)
