"""Adapters as PEFT writes them: generation computes what peft computes, and what merging gives."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillama.checkpoint.hf_reader import load_model
from minillama.checkpoint.hf_writer import save_model
from minillama.conversion.merge import merge_lora
from minillama.conversion.writer import Output
from minillama.lora import LoraConfig, add_lora, load_adapter, save_adapter
from minillama.model import Llama
from minillama.peft_adapters import read_adapter
from tests.conftest import random_model, random_tokens
from tests.peers import assert_same_logits, open_in_peft, open_in_transformers

TOKENS = random_tokens(2, 20)
EMBEDDING = "base_model.model.model.embed_tokens"
HEAD = "base_model.model.lm_head"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@torch.no_grad()
def logits(model: Llama) -> torch.Tensor:
    return model.logits(model(TOKENS))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model(random_model(), tmp_path / "base")
    return tmp_path / "base"


def peft_adapter(base: Path, directory: Path, **settings) -> torch.nn.Module:
    """Write an adapter with random factors; returns peft's model."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 20, "task_type": "CAUSAL_LM"} | settings)
    model = peft.get_peft_model(open_in_transformers(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    model.eval().save_pretrained(directory, save_embedding_layers=False)
    return model


def plain_adapter(directory: Path, tensors: dict[str, torch.Tensor], **config) -> Path:
    """Write an adapter with these tensors, of rank 2 and scale 2."""
    directory.mkdir()
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": []} | config
    (directory / "adapter_config.json").write_text(json.dumps(content))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def merged_logits(base: Path, adapters: list[Path], output: Path) -> torch.Tensor:
    merge_lora(base, adapters, Output(output))
    return logits(load_model(output))


KINDS = {
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "all but some": {
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["0.self_attn.q_proj"],
    },
    "biases, of which there are none": {"target_modules": ["q_proj"], "bias": "all"},
}
kinds = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)


@kinds
def test_what_merging_reads_generation_reads(settings: dict, base: Path, tmp_path: Path) -> None:
    peft_model = peft_adapter(base, tmp_path / "adapter", **settings)
    model = load_model(base)
    load_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        assert_same_logits(logits(model), peft_model(TOKENS).logits)
    merged = merged_logits(base, [tmp_path / "adapter"], tmp_path / "merged")
    assert_same_logits(logits(model), merged)


@kinds
def test_an_adapter_that_was_read_is_saved_as_the_same_one(
    settings: dict, base: Path, tmp_path: Path
) -> None:
    peft_adapter(base, tmp_path / "adapter", **settings)
    model = load_model(base)
    config = load_adapter(model, tmp_path / "adapter")
    save_adapter(model, config, tmp_path / "again", str(base))
    with torch.no_grad():
        assert_same_logits(logits(model), open_in_peft(base, tmp_path / "again")(TOKENS).logits)
    second = load_model(base)
    load_adapter(second, tmp_path / "again")
    assert torch.equal(logits(second), logits(model))


@pytest.mark.parametrize("file", ["adapter_model.bin", "pytorch_model.bin"])
def test_older_files_and_raw_training_names_are_the_same_adapter(
    file: str, base: Path, tmp_path: Path
) -> None:
    peft_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"], target_modules=["q_proj"])
    expected = load_model(base)
    load_adapter(expected, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    raw = {}
    for name, tensor in load_file(path).items():
        is_factor = "lora_" in name
        infix = ".default" if is_factor else ".modules_to_save.default"
        raw["module." + name.replace(".weight", f"{infix}.weight")] = tensor
    path.unlink()
    torch.save(raw, path.with_name(file))
    model = load_model(base)
    load_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(model), logits(expected))


def test_equal_copies_of_a_tensor_are_one_value(tmp_path: Path) -> None:
    """peft writes a module that was trained whole under up to three names."""
    table = torch.randn(50, 24)
    tensors = {
        f"{HEAD}.weight": table,
        f"{HEAD}.modules_to_save.weight": table.clone(),
        f"{HEAD}.original_module.weight": torch.zeros(50, 24),
    }
    adapter = read_adapter(plain_adapter(tmp_path / "adapter", tensors))
    assert list(adapter.whole) == ["lm_head.weight"]
    assert torch.equal(adapter.whole["lm_head.weight"].read(), table)


def test_an_adapter_with_a_larger_vocabulary_grows_the_model(base: Path, tmp_path: Path) -> None:
    tensors = {f"{EMBEDDING}.weight": torch.randn(60, 24), f"{HEAD}.weight": torch.randn(60, 24)}
    adapter = plain_adapter(tmp_path / "adapter", tensors)
    model = load_model(base)
    load_adapter(model, adapter)
    assert model.config.vocab_size == 60
    assert_same_logits(logits(model), merged_logits(base, [adapter], tmp_path / "merged"))


@pytest.mark.parametrize("names", [(EMBEDDING, HEAD), (HEAD,)], ids=["both", "the head"])
def test_a_tied_head_becomes_a_weight_of_its_own_where_the_adapter_has_another(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    save_model(random_model(tie_embeddings=True), base)
    tensors = {f"{name}.weight": torch.randn(50, 24) for name in names}
    adapter = plain_adapter(tmp_path / "adapter", tensors)
    model = load_model(base)
    load_adapter(model, adapter)
    assert not model.config.tie_embeddings
    assert_same_logits(logits(model), merged_logits(base, [adapter], tmp_path / "merged"))


def test_two_adapters_of_different_rank_and_scale_add_up(base: Path, tmp_path: Path) -> None:
    adapters = [tmp_path / "first", tmp_path / "second"]
    peft_adapter(base, adapters[0], target_modules=["q_proj", "embed_tokens"], lora_alpha=3)
    peft_adapter(base, adapters[1], target_modules=["q_proj", "embed_tokens", "up_proj"], r=6)
    model = load_model(base)
    for adapter in adapters:
        load_adapter(model, adapter)
    assert_same_logits(logits(model), merged_logits(base, adapters, tmp_path / "merged"))


def test_a_whole_head_replaces_what_an_earlier_adapter_added(base: Path, tmp_path: Path) -> None:
    peft_adapter(base, tmp_path / "first", target_modules=["q_proj", "lm_head"])
    tensors = {f"{HEAD}.weight": torch.randn(50, 24)}
    adapters = [tmp_path / "first", plain_adapter(tmp_path / "second", tensors)]
    model = load_model(base)
    for adapter in adapters:
        load_adapter(model, adapter)
    assert_same_logits(logits(model), merged_logits(base, adapters, tmp_path / "merged"))


def test_only_factors_and_whole_modules_of_a_loaded_adapter_are_trained(tmp_path: Path) -> None:
    config = LoraConfig(targets=("q_proj",), modules_to_save=("lm_head",))
    model = random_model()
    add_lora(model, config)
    save_adapter(model, config, tmp_path, "")
    loaded = random_model()
    load_adapter(loaded, tmp_path)
    for first, second in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert first[0] == second[0] and first[1].requires_grad == second[1].requires_grad
