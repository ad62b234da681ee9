"""Every LoRA that PEFT saves for a LLaMA computes PEFT's logits: beside its base, merged, trained.

PEFT's own model is the oracle, over a base with a tied head and over one without.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from minillama.checkpoint.hf_reader import load_model
from minillama.checkpoint.hf_writer import save_model
from minillama.conversion.merge import merge_lora
from minillama.conversion.writer import Output
from minillama.errors import UserError
from minillama.lora import load_adapter, save_adapter
from minillama.lora import merge_lora as merge_in_memory
from minillama.peft_config import refuse_tied_factors
from tests.adapters import TOKENS, logits
from tests.conftest import random_model
from tests.peers import assert_same_logits, open_in_transformers

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
KINDS: dict[str, dict[str, Any]] = {
    "factors of the embedding": {"target_modules": ["embed_tokens", "k_proj"]},
    "factors of the head": {"target_modules": ["lm_head", "k_proj"]},
    "factors of both": {"target_modules": ["embed_tokens", "lm_head"]},
    "the embedding whole": {"modules_to_save": ["embed_tokens"]},
    "the head whole": {"modules_to_save": ["lm_head"]},
    "both whole": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "one whole, one with factors": {
        "target_modules": ["embed_tokens"],
        "modules_to_save": ["lm_head"],
    },
    "norms whole": {"modules_to_save": ["norm"]},
    "a linear whole": {"target_modules": ["up_proj"], "modules_to_save": ["o_proj"]},
    "a whole module by its path": {"modules_to_save": ["model.embed_tokens"]},
    "a pattern": {"target_modules": r"model\.layers\.(0\.(?:self_attn|mlp)|1\.mlp)\.[^.]*_proj"},
    "one layer by its number": {"target_modules": ["v_proj"], "layers_to_transform": 1},
    "layers behind a pattern": {
        "target_modules": ["v_proj", "up_proj"],
        "layers_to_transform": [0],
        "layers_pattern": "layers",
    },
    "all but a pattern": {
        "target_modules": ["v_proj", "up_proj"],
        "exclude_modules": r".*\.1\.mlp.*",
    },
    "patterns of rank and alpha": {
        "target_modules": ["v_proj", "up_proj"],
        "rank_pattern": {r"layers\.\d+\.self_attn.*": 2, "^model.layers.1.*up_proj": 3},
        "alpha_pattern": {"(v|k)_proj": 1, "1.mlp.up_proj": 50},
    },
    "no parameters, said so": {"target_modules": ["q_proj"], "target_parameters": []},
}


def peft_adapter(base: Path, directory: Path, rows: int = 0, safe: bool = True, **settings):
    """Save an adapter in mid-training; returns peft's model. rows: of an enlarged vocabulary."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = open_in_transformers(base)
    if rows:
        model.resize_token_embeddings(rows)
    standard = {"r": 4, "lora_alpha": 20, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    tuned = peft.get_peft_model(model, peft.LoraConfig(**standard | settings))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    tuned.eval().save_pretrained(directory, safe_serialization=safe)
    return tuned


@pytest.fixture(params=[False, True], ids=["a head of its own", "a tied head"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_model(random_model(tie_embeddings=request.param), tmp_path / "base")
    return tmp_path / "base"


def check_everywhere(base: Path, adapter: Path, expected: torch.Tensor, merged: Path) -> None:
    """Compare with PEFT's logits: the model with the adapter, both kinds of merge, a saved copy."""
    model = load_model(base)
    config = load_adapter(model, adapter)
    assert_same_logits(logits(model), expected)
    save_adapter(model, config, merged / "again", str(base))
    again = load_model(base)
    load_adapter(again, merged / "again")
    assert_same_logits(logits(again), expected)

    report = merge_lora(base, [adapter], Output(merged / "hf"))
    assert report.deviation < 1e-5
    with torch.no_grad():
        assert_same_logits(open_in_transformers(merged / "hf")(TOKENS).logits, expected)
    assert_same_logits(logits(load_model(merged / "hf")), expected)

    merge_in_memory(model)
    save_model(model, merged / "memory")
    assert_same_logits(logits(load_model(merged / "memory")), expected)


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_pefts_logits_come_out_everywhere(settings: dict, base: Path, tmp_path: Path) -> None:
    tuned = peft_adapter(base, tmp_path / "adapter", **settings)
    with torch.no_grad():
        check_everywhere(base, tmp_path / "adapter", tuned(TOKENS).logits, tmp_path / "merged")


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("whole", [["embed_tokens", "lm_head"], ["embed_tokens"]], ids=str)
def test_an_enlarged_vocabulary_comes_with_the_adapter(
    whole: list[str], safe: bool, base: Path, tmp_path: Path
) -> None:
    """PEFT then saves one tensor under up to three names; equal copies are one value."""
    tuned = peft_adapter(base, tmp_path / "adapter", rows=57, safe=safe, modules_to_save=whole)
    with torch.no_grad():
        expected = tuned(TOKENS).logits
    assert expected.shape[-1] == 57
    check_everywhere(base, tmp_path / "adapter", expected, tmp_path / "merged")


def test_one_tensor_under_three_names_is_one_tensor(tmp_path: Path) -> None:
    save_model(random_model(tie_embeddings=True), tmp_path / "base")
    peft_adapter(tmp_path / "base", tmp_path / "a", rows=57, modules_to_save=["embed_tokens"])
    names = load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    spellings = [name for name in names if "embed_tokens" in name]
    assert len(spellings) == 3
    assert any(".original_module." in name for name in spellings)


def test_a_tied_pair_that_stays_equal_stays_tied(tmp_path: Path) -> None:
    save_model(random_model(tie_embeddings=True), tmp_path / "base")
    settings = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    tuned = peft_adapter(tmp_path / "base", tmp_path / "a", **settings)
    with torch.no_grad():
        expected = tuned(TOKENS).logits
    check_everywhere(tmp_path / "base", tmp_path / "a", expected, tmp_path / "merged")
    assert json.loads((tmp_path / "merged/hf/config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize(
    "kind",
    ["factors of the head", "factors of both", "one whole, one with factors", "norms whole"],
)
def test_an_adapter_goes_on_training_with_pefts_gradients(
    kind: str, base: Path, tmp_path: Path
) -> None:
    tuned = peft_adapter(base, tmp_path / "adapter", **KINDS[kind]).train()
    model = load_model(base)
    load_adapter(model, tmp_path / "adapter", dropout=0.0)
    targets = TOKENS[:, 1:]
    model.loss_sum(TOKENS[:, :-1], targets).backward()
    expected_logits = tuned(TOKENS[:, :-1]).logits
    F.cross_entropy(expected_logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()

    expected = {}
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".default", "")
            name = name.replace(".modules_to_save", "").replace("_A.weight", "_A")
            expected[name.replace("_B.weight", "_B")] = parameter.grad
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == expected.keys()
    for name, gradient in trained.items():
        assert_same_logits(gradient, expected[name], tolerance=1e-4)


def test_rows_that_were_only_saved_are_kept_and_not_trained(base: Path, tmp_path: Path) -> None:
    """PEFT saves an enlarged embedding and head with every adapter, and leaves them frozen."""
    tuned = peft_adapter(base, tmp_path / "adapter", rows=57)
    model = load_model(base)
    config = load_adapter(model, tmp_path / "adapter", dropout=0.0)
    assert config.modules_to_save == ()
    assert set(config.modules_to_copy) == {"embed_tokens", "lm_head"}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    with torch.no_grad():
        check_everywhere(base, tmp_path / "adapter", tuned(TOKENS).logits, tmp_path / "merged")


def test_tied_factors_are_computed_and_not_trained_further(tmp_path: Path) -> None:
    save_model(random_model(tie_embeddings=True), tmp_path / "base")
    settings = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    tuned = peft_adapter(tmp_path / "base", tmp_path / "a", **settings)
    with torch.no_grad():
        expected = tuned(TOKENS).logits
    check_everywhere(tmp_path / "base", tmp_path / "a", expected, tmp_path / "merged")
    with pytest.raises(UserError, match="ensure_weight_tying"):
        refuse_tied_factors(tmp_path / "a")
    peft_adapter(tmp_path / "base", tmp_path / "b", target_modules=["embed_tokens"])
    refuse_tied_factors(tmp_path / "b")


def test_dropout_falls_on_the_input_of_a_as_in_peft(tmp_path: Path) -> None:
    save_model(random_model(), tmp_path / "base")
    tuned = peft_adapter(tmp_path / "base", tmp_path / "adapter", lora_dropout=0.5).train()
    model = load_model(tmp_path / "base")
    load_adapter(model, tmp_path / "adapter")
    name = "model.layers.0.self_attn.q_proj"
    x = torch.randn(2, 7, 24)
    torch.manual_seed(3)
    expected = tuned.get_submodule(f"base_model.model.{name}")(x)
    torch.manual_seed(3)
    assert_same_logits(model.train().get_submodule(name)(x), expected)
