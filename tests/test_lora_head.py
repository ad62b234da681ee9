"""Adapters on the head and the embedding in training: loss and gradients are those of PEFT."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minillama.checkpoint.hf_reader import load_model
from minillama.checkpoint.hf_writer import save_model
from minillama.lora import LINEARS, LoraConfig, add_lora, load_adapter, save_adapter
from minillama.training.estimate import trainable_count
from tests.adapters import TOKENS, with_random_adapter
from tests.conftest import random_model
from tests.peers import assert_same_logits, open_in_peft, open_in_transformers

INPUTS = TOKENS[:, :-1]
LABELS = TOKENS[:, 1:]


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), LABELS.flatten(), reduction="sum")


def factor_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of each factor, without PEFT's additions to its name."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        name = name.removeprefix("base_model.model.").replace(".default", "")
        assert parameter.grad is not None, name
        gradients[name.removesuffix(".weight")] = parameter.grad
    return gradients


def assert_same_training(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    our_loss = ours.loss_sum(INPUTS, LABELS)
    their_loss = loss_of(theirs(INPUTS).logits)
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    our_loss.backward()
    their_loss.backward()
    our_gradients = factor_gradients(ours)
    their_gradients = factor_gradients(theirs)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        assert_same_logits(gradient, their_gradients[name])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(targets=("lm_head",)),
        LoraConfig(targets=("lm_head", *LINEARS), rank=3, alpha=9.0, use_rslora=True),
        LoraConfig(targets=("q_proj", "lm_head"), rank_pattern={"lm_head": 5}),
    ],
    ids=["the head alone", "all with rsLoRA", "a rank of its own"],
)
def test_an_adapter_on_the_head_trains_as_in_peft(
    config: LoraConfig, tied: bool, tmp_path: Path
) -> None:
    save_model(random_model(tie_embeddings=tied), tmp_path / "base")
    ours = with_random_adapter(random_model(tie_embeddings=tied), config)
    save_adapter(ours, config, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = open_in_peft(tmp_path / "base", tmp_path / "adapter", trainable=True)
    assert_same_training(ours, theirs)


def test_a_loaded_adapter_on_head_and_embedding_trains_as_in_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    save_model(random_model(), tmp_path / "base")
    torch.manual_seed(0)
    targets = ["lm_head", "embed_tokens", "v_proj"]
    settings = peft.LoraConfig(r=4, lora_alpha=20, task_type="CAUSAL_LM", target_modules=targets)
    theirs = peft.get_peft_model(open_in_transformers(tmp_path / "base"), settings)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ours = load_model(tmp_path / "base")
    load_adapter(ours, tmp_path / "adapter")
    assert_same_training(ours, theirs)


def test_the_loss_is_that_of_the_logits_with_dropout_too() -> None:
    """Dropout falls on what the factors read, not on what the frozen head reads."""
    model = with_random_adapter(random_model(), LoraConfig(targets=("lm_head",), dropout=0.5))
    model.train()
    torch.manual_seed(0)
    expected = loss_of(model.logits(model(INPUTS)))
    torch.manual_seed(0)
    assert model.loss_sum(INPUTS, LABELS).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_of_a_16_bit_head_has_its_factors_gradients_in_fp32() -> None:
    model = with_random_adapter(random_model().bfloat16(), LoraConfig(targets=("lm_head",)))
    exact = with_random_adapter(random_model(), LoraConfig(targets=("lm_head",)))
    model.loss_sum(INPUTS, LABELS).backward()
    exact.loss_sum(INPUTS, LABELS).backward()
    for factor in ("lora_A", "lora_B"):
        gradient = model.lm_head.get_parameter(factor).grad
        assert gradient.dtype == torch.float32
        assert_same_logits(gradient, exact.lm_head.get_parameter(factor).grad, tolerance=0.05)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_is_trained_whole_gets_no_adapter_as_in_peft(tied: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    whole = ("embed_tokens", "lm_head")
    config = LoraConfig(targets=("q_proj", "lm_head"), modules_to_save=whole)
    model = random_model(tie_embeddings=tied)
    add_lora(model, config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("lm_head.lora" in name for name in trained)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable_count(model.config, config) == count

    if not tied:
        save_model(random_model(), tmp_path)
        settings = peft.LoraConfig(
            r=8, target_modules=["q_proj", "lm_head"], modules_to_save=list(whole)
        )
        theirs = peft.get_peft_model(open_in_transformers(tmp_path), settings)
        assert count == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "targets", [("lm_head",), ("self_attn.q_proj",), (r"re:.*\.1\..*",)], ids=str
)
def test_the_estimate_counts_an_adapter_on_any_target(targets: tuple[str, ...], tied: bool) -> None:
    model = random_model(tie_embeddings=tied)
    config = LoraConfig(targets=targets)
    add_lora(model, config)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable_count(model.config, config) == count
