"""Plans that hold: what --dry_run predicts is what a run then needs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillama import comm, ops, presets
from minillama.comm import Mesh
from minillama.errors import UserError
from minillama.grid import make_grid
from minillama.hf_config import read_config
from minillama.llama_config import PUBLISHED, LlamaConfig
from minillama.lora import LINEARS, LoraConfig, add_lora
from minillama.model import Llama
from minillama.parallel.sharded_optimizer import ShardedOptimizer
from minillama.train_config import TrainConfig
from minillama.training.dry_run import describe
from minillama.training.estimate import activation_bytes, estimate, trainable_count
from minillama.training.model_building import lora_config, recompute_activations

GOLDEN = Path(__file__).parent / "golden"
SMALL = LlamaConfig(
    dim=192,
    n_layers=4,
    n_heads=6,
    n_kv_heads=3,
    head_dim=32,
    ffn_dim=512,
    vocab_size=16000,
    max_seq_len=256,
    norm_eps=1e-5,
    rope_theta=10000.0,
)


def storage_bytes(tensors) -> int:
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {
            "lora": True,
            "lora_rank": 64,
            "lora_targets": ("all",),
            "modules_to_save": ("embed_tokens", "lm_head"),
        },
    ],
    ids=["full", "lora"],
)
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(("stage", "size"), [(0, 1), (0, 4), (1, 4), (2, 4)])
def test_predicted_state_is_measured_state_within_two_percent(
    precision, lora, accumulation, stage, size, monkeypatch
):
    monkeypatch.setattr(comm, "reduce_to", lambda mesh, tensor, **_: lambda: tensor)
    settings = TrainConfig(
        precision=precision, zero_stage=stage, gradient_accumulation_steps=accumulation, **lora
    )
    model = Llama(SMALL).initialise().to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    if settings.lora:
        add_lora(model, lora_config(settings))
    optimizer = ShardedOptimizer(
        model.named_parameters(), make_grid(Mesh(rank=0, size=size)), settings
    )
    tokens = torch.arange(8).view(1, 8)
    optimizer.backward(model.loss_sum(tokens, tokens), size)
    held = [t for part in optimizer.vectors for t in (part.master, part.m, part.v)]
    for part in optimizer.vectors:
        reducer = part.gradients
        held.append(reducer.sum if reducer.every_micro_batch else reducer.vector)
    expected = estimate(SMALL, settings, size)
    assert storage_bytes([*model.parameters(), *held]) == pytest.approx(expected.total, rel=0.02)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected.trainable


@pytest.mark.parametrize("lengths", [[256] * 3, [200, 13, 90, 256, 1, 77]], ids=str)
@pytest.mark.parametrize(
    "config", [SMALL, replace(PUBLISHED["15m"], vocab_size=300, n_layers=3)], ids=["gqa", "15m"]
)
def test_predicted_activations_are_those_kept_for_backward_within_ten_percent(config, lengths):
    def kept(recompute: bool, lora: bool = False) -> int:
        model, seen = Llama(config).initialise(), {}
        if lora:
            model.bfloat16()
            add_lora(model, LoraConfig(rank=4, targets=LINEARS))
        if recompute:
            recompute_activations(model.model.layers)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in own:
                seen[tensor.untyped_storage().data_ptr()] = (
                    tensor  # held, so that no address is used twice
                )
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.randint(0, 300, (1, sum(lengths))), ops.Documents(lengths))
        return storage_bytes(seen.values())

    tokens = sum(lengths)
    assert kept(recompute=False) == pytest.approx(activation_bytes(config, tokens, 4), rel=0.1)
    one_layer = (activation_bytes(config, tokens, 4) - tokens * config.dim * 4) / config.n_layers
    assert kept(recompute=True) == pytest.approx(
        activation_bytes(config, tokens, 4, recompute=True) - one_layer, rel=0.1
    )
    # An adapter in fp32 keeps no copy of its 16-bit input.
    in_16_bits = activation_bytes(config, tokens, 2)
    assert kept(recompute=False, lora=True) == pytest.approx(in_16_bits, rel=0.15)


@pytest.mark.parametrize("name", ["7b", "70b"])
def test_parameters_are_counted_without_making_any(name):
    with torch.device("meta"):
        model = Llama(PUBLISHED[name])
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name].parameter_count()


@pytest.mark.parametrize(
    ("stage", "gradients"), [(0, 4.0), (1, 1.0), (2, 1.0)], ids=lambda value: str(value)
)
def test_the_exact_reduction_keeps_fp32_sums_shared_out_from_stage_1_on(stage, gradients):
    """Bytes per parameter of a bf16 model on four ranks, in a single micro-batch too."""
    settings = TrainConfig(precision="bf16", zero_stage=stage, reduction="exact")
    expected = estimate(SMALL, settings, world_size=4)
    assert expected.gradients == gradients * SMALL.parameter_count()


def test_a_plan_says_that_rows_longer_than_the_context_will_be_refused(tiny_checkpoint):
    ckpt = str(tiny_checkpoint(max_seq_len=64))
    refused = "this run will not start: max_length = 65 exceeds the model's context of 64"
    assert refused in describe(TrainConfig(ckpt=ckpt, max_length=65), world_size=1)
    assert "will not start" not in describe(TrainConfig(ckpt=ckpt, max_length=64), world_size=1)


def test_a_plan_from_scratch_counts_the_tokens_of_the_tokenizer():
    """The demo's run prints 902,272 too. A published shape has another vocabulary."""
    assert "parameters  902,272;" in describe(presets.resolve("demo", {}), world_size=1)

    settings = TrainConfig(init="scratch", model="15m", tokenizer=str(GOLDEN / "model"))
    assert "vocabulary 400\n" in describe(settings, world_size=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": True, "lora_targets": ("q_proj", "v_prj")}, "'v_prj' names no linear.*v_proj"),
        ({"template": "vicuna"}, "no template 'vicuna'"),
    ],
    ids=["target", "template"],
)
def test_a_plan_refuses_names_that_the_run_would_refuse(tiny_checkpoint, changes, message):
    settings = TrainConfig(ckpt=str(tiny_checkpoint(max_seq_len=64)), max_length=64, **changes)
    with pytest.raises(UserError, match=message):
        describe(settings, world_size=1)


def test_a_plan_is_for_the_vocabulary_that_the_tokenizer_makes(tiny_checkpoint, small_tokenizer):
    ckpt = tiny_checkpoint(vocab_size=100, max_seq_len=64)
    settings = TrainConfig(
        ckpt=str(ckpt),
        tokenizer=str(small_tokenizer.path),
        max_length=64,
        lora=True,
        modules_to_save=("embed_tokens", "lm_head"),
    )
    plan = describe(settings, world_size=1)
    grown = replace(read_config(ckpt), vocab_size=small_tokenizer.size)
    assert f"vocabulary {small_tokenizer.size:,}" in plan
    assert f"trained: {trainable_count(grown, lora_config(settings)):,} " in plan


def test_a_plan_says_that_a_larger_vocabulary_will_be_refused(tiny_checkpoint, small_tokenizer):
    settings = TrainConfig(
        ckpt=str(tiny_checkpoint(vocab_size=100)), tokenizer=str(small_tokenizer.path)
    )
    refused = f"this run will not start: {small_tokenizer.path} has 400 tokens"
    assert refused in describe(settings, world_size=1)
    assert refused in describe(replace(settings, lora=True), world_size=1)
    assert refused not in describe(replace(settings, grow_vocabulary=True), world_size=1)


def test_a_plan_without_its_tokenizer_says_that_the_run_will_be_refused(tiny_checkpoint):
    settings = TrainConfig(ckpt=str(tiny_checkpoint()), tokenizer="nowhere.model", max_length=64)
    refused = "this run will not start: nowhere.model: no such tokenizer file"
    assert refused in describe(settings, world_size=1)


def test_a_plan_is_for_the_adapter_that_the_run_starts_from():
    adapter = GOLDEN / "adapter"
    settings = TrainConfig(ckpt=str(GOLDEN / "model"), adapter=str(adapter), lora=True)
    factors = load_file(adapter / "adapter_model.safetensors").values()
    trained = sum(tensor.numel() for tensor in factors)
    assert f"trained: {trained:,} " in describe(settings, world_size=1)
