"""LoRA: starts as the identity, merges to itself, and is PEFT's, both ways."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from minillama.checkpoint.hf_reader import load_model
from minillama.checkpoint.hf_writer import save_model
from minillama.errors import UserError
from minillama.lora import (
    LINEARS,
    LoraConfig,
    LoraLinear,
    add_lora,
    load_adapter,
    merge_lora,
    resolve_names,
    save_adapter,
)
from minillama.training.estimate import trainable_count
from tests.adapters import TOKENS, logits, with_random_adapter
from tests.conftest import random_model
from tests.peers import assert_same_logits, open_in_peft, open_in_transformers

KINDS = {
    "default": LoraConfig(),
    "all linears": LoraConfig(rank=4, alpha=12.0, targets=LINEARS),
    "rsLoRA": LoraConfig(rank=9, alpha=6.0, use_rslora=True),
    "rank and alpha patterns": LoraConfig(
        targets=("q_proj", "k_proj", "down_proj"),
        # the last names no module: a pattern reaches to the end of the name
        rank_pattern={"k_proj": 3, r"layers\.1\.mlp\.down_proj": 5, "down": 2},
        alpha_pattern={"q_proj": 2.0, "layers.0.self_attn.k_proj": 40.0},
    ),
    "patterns under rsLoRA": LoraConfig(rank_pattern={"q_proj": 4}, use_rslora=True),
    "head and embedding trained whole": LoraConfig(modules_to_save=("embed_tokens", "lm_head")),
}


kinds = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


@kinds
def test_a_new_adapter_changes_nothing(config: LoraConfig) -> None:
    model = random_model()
    before = logits(model)
    add_lora(model, config)
    assert torch.equal(logits(model), before)


@kinds
def test_a_trained_adapter_changes_something_and_merging_changes_nothing(
    config: LoraConfig,
) -> None:
    """x W^T + s (x A^T) B^T equals x (W + s B A)^T, up to rounding."""
    plain = logits(random_model())
    model = with_random_adapter(random_model(), config)
    unmerged = logits(model)
    assert (unmerged - plain).abs().max() > 0.1 * plain.abs().max()
    merge_lora(model)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert_same_logits(logits(model), unmerged)


@kinds
def test_peft_opens_our_adapter_and_gives_our_logits(config: LoraConfig, tmp_path: Path) -> None:
    save_model(random_model(), tmp_path / "base")
    ours = with_random_adapter(random_model(), config)
    save_adapter(ours, config, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = open_in_peft(tmp_path / "base", tmp_path / "adapter")
    with torch.no_grad():
        assert_same_logits(logits(ours), theirs(TOKENS).logits)
        assert_same_logits(logits(ours), theirs.merge_and_unload()(TOKENS).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "r": 3},
        {"target_modules": ["q_proj"], "use_rslora": True},
        {"target_modules": r".*\.1\..*(gate|o)_proj"},
        {"target_modules": ["layers.0.self_attn.k_proj", "up_proj"]},
        {
            "target_modules": ["q_proj"],
            "rank_pattern": {"0.self_attn.q_proj": 2},
            "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 1},
        },
        {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ],
    ids=str,
)
def test_we_open_pefts_adapter_and_give_its_logits(settings: dict, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    save_model(random_model(), tmp_path / "base")
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        open_in_transformers(tmp_path / "base"),
        peft.LoraConfig(**{"r": 8, "lora_alpha": 20, "task_type": "CAUSAL_LM"} | settings),
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    theirs.eval().save_pretrained(tmp_path / "adapter")
    ours = load_model(tmp_path / "base")
    load_adapter(ours, tmp_path / "adapter")
    with torch.no_grad():
        assert_same_logits(logits(ours), theirs(TOKENS).logits)


def test_a_saved_adapter_loads_as_it_was(tmp_path: Path) -> None:
    config = KINDS["rank and alpha patterns"]
    ours = with_random_adapter(random_model(), config)
    save_adapter(ours, config, tmp_path, "")
    again = random_model()
    assert load_adapter(again, tmp_path) == LoraConfig(
        **config.__dict__ | {"targets": tuple(sorted(config.targets))}
    )
    assert torch.equal(logits(again), logits(ours))


def test_a_tied_head_trained_whole_is_saved_under_both_its_names(tmp_path: Path) -> None:
    config = LoraConfig(modules_to_save=("embed_tokens", "lm_head"))
    ours = with_random_adapter(random_model(tie_embeddings=True), config)
    save_adapter(ours, config, tmp_path, "")
    again = random_model(tie_embeddings=True)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(ours))


@pytest.mark.parametrize("one", ["embed_tokens", "lm_head"])
def test_half_of_a_tied_pair_cannot_be_trained_whole(one: str) -> None:
    """PEFT would train a copy of one of the two. With one weight for both, no such model exists."""
    with pytest.raises(UserError, match=r"modules_to_save: .*tied"):
        add_lora(random_model(tie_embeddings=True), LoraConfig(modules_to_save=(one,)))


def test_only_factors_and_modules_to_save_are_trained() -> None:
    model = random_model()
    add_lora(model, LoraConfig(modules_to_save=("lm_head",)))
    trained = {
        name.removeprefix("model.layers.0.").removeprefix("model.layers.1.")
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    assert trained == {
        "self_attn.q_proj.lora_A",
        "self_attn.q_proj.lora_B",
        "self_attn.v_proj.lora_A",
        "self_attn.v_proj.lora_B",
        "lm_head.weight",
    }


@kinds
def test_the_estimate_counts_what_is_trained(config: LoraConfig) -> None:
    model = random_model()
    add_lora(model, config)
    assert trainable_count(model.config, config) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_factors_are_fp32_beside_16_bit_weights() -> None:
    model = with_random_adapter(random_model().bfloat16(), LoraConfig())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(TOKENS).dtype == torch.bfloat16


def test_a_is_drawn_as_peft_draws_it_and_follows_the_seed() -> None:
    """kaiming_uniform(sqrt 5) of an (R, in) matrix is uniform within 1 / sqrt(in)."""
    first, same = random_model(), random_model()
    add_lora(first, LoraConfig(rank=64), torch.Generator().manual_seed(3))
    add_lora(same, LoraConfig(rank=64), torch.Generator().manual_seed(3))
    A = first.model.layers[0].self_attn.q_proj.lora_A
    assert 0.98 / math.sqrt(24) < float(A.detach().abs().max()) < 1 / math.sqrt(24)
    assert torch.equal(A, same.model.layers[0].self_attn.q_proj.lora_A)


def test_dropout_falls_on_the_adapters_input_in_training_only() -> None:
    model = with_random_adapter(random_model(), LoraConfig(dropout=0.5))
    without = with_random_adapter(random_model(), LoraConfig())
    assert torch.equal(logits(model.eval()), logits(without))
    assert not torch.equal(logits(model.train()), logits(without))


def test_megatron_names_mean_ours() -> None:
    assert resolve_names(("query_key_value", "dense")) == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert resolve_names(("proj", "dense_h_to_4h", "dense_4h_to_h")) == (
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    assert resolve_names(("word_embeddings", "lm_head.lm_head")) == ("embed_tokens", "lm_head")
    assert resolve_names(("all",)) == LINEARS


def test_a_target_that_names_nothing_is_an_error_with_the_closest() -> None:
    with pytest.raises(UserError, match=r"'q_porj' names no linear.*did you mean 'q_proj'"):
        add_lora(random_model(), LoraConfig(targets=("v_proj", "q_porj")))
    with pytest.raises(UserError, match=r"'re:.*attn' names no linear"):  # but only a beginning
        add_lora(random_model(), LoraConfig(targets=("re:.*attn",)))
    with pytest.raises(UserError, match=r"'_proj' names no linear"):  # a tail, but of no name
        add_lora(random_model(), LoraConfig(targets=("_proj",)))
    with pytest.raises(UserError, match=r"modules_to_save: 'lm_haed'.*did you mean 'lm_head'"):
        add_lora(random_model(), LoraConfig(modules_to_save=("lm_haed",)))


def test_merging_is_one_rounding_of_the_fp32_sum() -> None:
    """W + s B A, computed in fp32 and rounded once to W's 16 bits."""
    model = with_random_adapter(random_model().half(), LoraConfig(rank=2, alpha=6.0))
    module = model.model.layers[0].self_attn.q_proj
    expected = (
        module.weight.double() + 3.0 * module.lora_B.double() @ module.lora_A.double()
    ).half()
    assert (
        module.merged_weight() == expected
    ).float().mean() > 0.99  # fp32 and fp64 sums may fall on two sides of a tie


def test_an_adapter_on_16_bit_weights_has_the_gradients_of_its_formula() -> None:
    """y = x W^T + s (x A^T) B^T with the adapter's products in fp32, as autograd takes it apart."""
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(24, 16, bias=False).bfloat16(), rank=4, scale=2.0, dropout=0.0)
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 5, 24).bfloat16().requires_grad_()
    dy = torch.randn(2, 5, 16).bfloat16()
    inputs = (x, layer.lora_A, layer.lora_B)
    low = x.float() @ layer.lora_A.T
    formula = x @ layer.weight.T + (low @ (2.0 * layer.lora_B.T)).bfloat16()
    found = layer(x)
    assert torch.equal(found, formula)
    expected = torch.autograd.grad(formula, inputs, dy)
    for gradient, right in zip(torch.autograd.grad(found, inputs, dy), expected, strict=True):
        assert gradient.dtype == right.dtype
        torch.testing.assert_close(gradient, right, rtol=1e-5, atol=1e-5)
