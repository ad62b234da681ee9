"""An adapter's files: what does not fit, or would compute something else, is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillama.errors import UserError
from minillama.lora import (
    LoraConfig,
    load_adapter,
    save_adapter,
)
from tests.adapters import logits, with_random_adapter
from tests.conftest import random_model


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save_adapter(
        with_random_adapter(random_model(), LoraConfig()), LoraConfig(), tmp_path / "adapter", ""
    )
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("peft_type", "IA3"),
        ("layer_replication", [[0, 1]]),
        ("use_qalora", True),
        ("trainable_token_indices", [1]),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("kasa_config", {}),
        ("alora_invocation_tokens", [1, 2]),
    ],
)
def test_a_kind_of_adapter_that_computes_otherwise_is_refused_by_name(
    key: str, value: object, adapter: Path
) -> None:
    about = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(about | {key: value}))
    with pytest.raises(UserError, match=f"{key} = "):
        load_adapter(random_model(), adapter)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda about: about.pop("lora_alpha"), "key 'lora_alpha' is missing"),
        (lambda about: about.pop("r"), "key 'r' is missing"),
        (lambda about: about.update(r="many"), "r is 'many', expected a rank"),
    ],
)
def test_a_damaged_adapter_config_is_named(change, named: str, adapter: Path) -> None:
    about = json.loads((adapter / "adapter_config.json").read_text())
    change(about)
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=f"adapter_config.json: .*{named}"):
        load_adapter(random_model(), adapter)


def test_keys_that_change_no_arithmetic_are_ignored(adapter: Path) -> None:
    about = json.loads((adapter / "adapter_config.json").read_text())
    about |= {
        "merge_weights": False,
        "enable_lora": None,
        "megatron_core": "megatron.core",
        "peft_version": "0.21.2",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    load_adapter(random_model(), adapter)


def rewrite(adapter: Path, change) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


PREFIX = "base_model.model.model.layers.0."


FIRST = f"{PREFIX}self_attn.q_proj.lora_A.weight"


def without(tensors: dict[str, torch.Tensor], text: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if text not in name}


def with_factors_of(module: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, and those of layer 0's q_proj under the name of another module too."""
    copies = {
        name.replace("q_proj", module): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.0.self_attn.q_proj" in name
    }
    return tensors | copies


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: without(t, FIRST), "layers.0.self_attn.q_proj has lora_B without its other"),
        (lambda t: without(t, "0.self_attn.q"), "0.self_attn.q_proj.lora_A.weight is missing"),
        (lambda t: with_factors_of("o_proj", t), "o_proj.lora_A.weight fits no module"),
        (lambda t: with_factors_of("qq_proj", t), "qq_proj.lora_A.weight fits no module"),
        (lambda t: t | {FIRST: t[FIRST][:, :20].contiguous()}, "(8, 20), the model wants (8, 24)"),
        (
            lambda t: t | {f"{PREFIX}self_attn.q_proj.bias": torch.ones(24)},
            "q_proj.bias fits no module",
        ),
    ],
    ids=["half missing", "missing", "no target", "left over", "another shape", "a bias"],
)
def test_a_tensor_that_does_not_fit_is_an_error(change, named: str, adapter: Path) -> None:
    rewrite(adapter, change)
    with pytest.raises(UserError) as error:
        load_adapter(random_model(), adapter)
    assert named in str(error.value)


def test_names_of_a_raw_training_state_are_understood(adapter: Path) -> None:
    expected = random_model()
    load_adapter(expected, adapter)
    rewrite(
        adapter,
        lambda t: {
            name.replace(".weight", ".default.weight"): tensor for name, tensor in t.items()
        },
    )
    model = random_model()
    load_adapter(model, adapter)
    assert torch.equal(logits(model), logits(expected))


def test_a_missing_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json: no such file"):
        load_adapter(random_model(), tmp_path)
