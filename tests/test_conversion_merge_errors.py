"""Adapters that do not fit their base are refused by name, before anything is written."""

import json
import shutil

import pytest
import torch

from minillama.conversion.merge import merge_lora
from minillama.conversion.writer import Output
from minillama.errors import UserError
from minillama.hf_config import read_config
from minillama.peft_adapters import read_adapter
from tests.conversions import Q_PROJ, factors, plain_adapter

LAYER_9 = "base_model.model.model.layers.9.self_attn.q_proj"
MISFITS = {
    "a factor alone": (
        {f"{Q_PROJ}.lora_A.weight": torch.zeros(2, 24)},
        "q_proj has lora_A without its other half",
    ),
    "a bias": (factors() | {f"{Q_PROJ}.lora_B.bias": torch.zeros(24)}, "not a LoRA key"),
    "two adapters": (
        factors() | factors(middle=".other"),
        "a second value .* more than one adapter",
    ),
    "a layer too many": (
        factors(LAYER_9),
        r"layers\.9\..*: the base has no such tensor \(did you mean",
    ),
    "rows": (factors(rows=12), r"the adapter makes \(12, 24\), the base has \(24, 24\)"),
    "another head": (
        {"base_model.model.score.weight": torch.zeros(2, 24)},
        "score.weight: the base has no such tensor",
    ),
    "a smaller head": (
        {"base_model.model.lm_head.weight": torch.zeros(40, 24)},
        r"lm_head.weight is \(40, 24\), in the base \(50, 24\)",
    ),
    "a larger embedding without its head": (
        {"base_model.model.model.embed_tokens.weight": torch.zeros(60, 24)},
        "lm_head.weight is",
    ),
    "DoRA": (
        factors() | {f"{Q_PROJ}.lora_magnitude_vector": torch.ones(24)},
        "DoRA is not supported",
    ),
}
CONFIGS = [
    ({"use_dora": True}, "use_dora = True is not supported; merge the adapter with peft"),
    ({"peft_type": "IA3"}, "peft_type = 'IA3' is not supported"),
    ({"r": 3}, r"lora_A is \(2, 24\) and lora_B \(24, 2\), adapter_config.json says rank 3"),
    ({"r": "many"}, r"adapter_config\.json: r is 'many', expected a rank"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
    ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens = \[1\] is not supported"),
]


@pytest.mark.parametrize(("tensors", "message"), MISFITS.values(), ids=MISFITS)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    tmp_path, tiny_checkpoint, tensors, message
):
    adapter = plain_adapter(tmp_path / "a", tensors)
    with pytest.raises(UserError, match=message):
        merge_lora(tiny_checkpoint(), [adapter], Output(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("config", "message"), CONFIGS)
def test_a_configuration_of_another_arithmetic_is_refused_by_key(
    tmp_path, tiny_checkpoint, config, message
):
    adapter = plain_adapter(tmp_path / "a", factors(), **config)
    with pytest.raises(UserError, match=message):
        merge_lora(tiny_checkpoint(), [adapter], Output(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_adapter_directory_needs_its_files(tmp_path):
    config = tmp_path / "adapter_config.json"
    missing = r"adapter_config\.json: no such file; an adapter is a directory"
    with pytest.raises(UserError, match=missing):
        read_adapter(tmp_path)
    for content, message in (
        ("{", "not valid JSON"),
        ("[]", "holds no JSON object"),
        ('{"r": 8}', "key 'lora_alpha' is missing"),
        ('{"r": 8, "lora_alpha": 8}', r"holds no adapter_model\.safetensors"),
    ):
        config.write_text(content)
        with pytest.raises(UserError, match=message):
            read_adapter(tmp_path)


def test_the_directory_of_a_run_in_the_place_of_its_model_is_named(tmp_path, tiny_checkpoint):
    """The other commands take the final/ of a run by themselves; a conversion asks for it."""
    (tmp_path / "run").mkdir()
    final = plain_adapter(tmp_path / "run/final", factors())
    with pytest.raises(UserError, match=f"directory of a run: give {final}"):
        read_adapter(final.parent)

    shutil.copytree(tiny_checkpoint(), tmp_path / "model_run/final")
    with pytest.raises(UserError, match=f"directory of a run: give {tmp_path / 'model_run/final'}"):
        read_config(tmp_path / "model_run")


def test_a_vocabulary_that_was_not_saved_is_noticed(tmp_path, tiny_checkpoint, shared):
    adapter = plain_adapter(tmp_path / "a", factors())
    tokenizer = (shared / "models/stories260K/tokenizer.model").read_bytes()
    (adapter / "tokenizer.model").write_bytes(tokenizer)
    message = "512 tokens, but the embedding has 50 rows and the adapter brings no larger one"
    with pytest.raises(UserError, match=message):
        merge_lora(tiny_checkpoint(), [adapter], Output(tmp_path / "out"))


def test_quantized_bases_are_refused(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint()
    raw_config = json.loads((base / "config.json").read_text())
    raw_config["quantization_config"] = {"bits": 4}
    (base / "config.json").write_text(json.dumps(raw_config))
    adapter = plain_adapter(tmp_path / "a", factors())
    with pytest.raises(UserError, match="quantization_config"):
        merge_lora(base, [adapter], Output(tmp_path / "out"))
