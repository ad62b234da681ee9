"""Merging LoRA: peft's merge_and_unload is the oracle; the sum is rounded once."""

import json
from pathlib import Path

import pytest
import torch

from minillama.checkpoint.hf_reader import load_model
from minillama.conversion.checksums import manifest
from minillama.conversion.merge import merge_lora
from minillama.conversion.writer import Output
from minillama.errors import UserError
from minillama.hf_config import read_config
from tests.conftest import random_tokens
from tests.conversions import (
    EMBEDDING,
    HEAD,
    Q_PROJ,
    factors,
    peft_adapter,
    plain_adapter,
    product,
    read_weights,
    run_convert,
)
from tests.peers import assert_same_logits, open_in_peft, open_in_transformers

TOKENS = random_tokens(2, 20)
Q_WEIGHT = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
            "alpha_pattern": {"v_proj": 1.5, "layers.1.mlp.up_proj": 9},
        },
        {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    ],
    ids=str,
)
def test_merging_equals_peft(tmp_path, tiny_checkpoint, lora, safe):
    base = tiny_checkpoint()
    model = peft_adapter(base, tmp_path / "adapter", safe, **lora)
    merge_lora(base, [tmp_path / "adapter"], Output(tmp_path / "out"))
    expected = model.merge_and_unload().state_dict()
    merged = read_weights(tmp_path / "out")
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-7)


def test_logits_of_the_merged_model_equal_pefts_unmerged(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint()
    expected = peft_adapter(base, tmp_path / "adapter").eval()
    merge_lora(base, [tmp_path / "adapter"], Output(tmp_path / "out"))
    model = load_model(tmp_path / "out")
    tokens = torch.arange(12)[None]
    logits = model.logits(model(tokens))
    torch.testing.assert_close(logits, expected(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("output_dtype", [None, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_adapters_are_summed_in_fp32_and_rounded_once(
    tmp_path, tiny_checkpoint, dtype, output_dtype
):
    """The error is at most half the distance between neighbouring 16-bit numbers."""
    base = tiny_checkpoint(dtype=dtype)
    tensors = factors() | factors("model.layers.1.mlp.up_proj", 42)
    adapters = [plain_adapter(tmp_path / name, tensors) for name in "ab"]
    merge_lora(base, adapters, Output(tmp_path / "out", dtype=output_dtype))
    merged = read_weights(tmp_path / "out")[Q_WEIGHT]
    double = {name: tensor.double() for name, tensor in tensors.items()}
    exact = read_weights(base)[Q_WEIGHT].double() + 2 * 2 * product(double)  # two adapters, s = 2
    half_distance = exact.abs() * torch.finfo(merged.dtype).eps / 2
    assert merged.dtype == (output_dtype or dtype)
    assert ((merged.double() - exact).abs() <= half_distance * (1 + 1e-3) + 1e-9).all()


def test_a_grown_vocabulary_of_the_last_adapter_wins(tmp_path, tiny_checkpoint, shared):
    base = tiny_checkpoint(vocab_size=500)
    tokenizer = (shared / "models/stories260K/tokenizer.model").read_bytes()
    tables = {name: torch.randn(512, 24) for name in "ab"}
    adapters = []
    for name, table in tables.items():
        whole = {
            "base_model.model.model.embed_tokens.weight": table,
            "base_model.model.lm_head.weight": table + 1,
        }
        adapter = plain_adapter(tmp_path / name, factors() | whole)
        (adapter / "tokenizer.model").write_bytes(tokenizer)
        adapters.append(adapter)
    out = tmp_path / "out"
    merge_lora(base, adapters, Output(out))
    merged = read_weights(out)
    assert torch.equal(merged[EMBEDDING], tables["b"])
    assert torch.equal(merged[HEAD], tables["b"] + 1)
    assert read_config(out).vocab_size == 512
    assert (out / "tokenizer.model").is_file()
    assert load_model(out)

    special_tokens = '{"pad_token": "[PAD]", "eos_token": {"content": "</s>"}}'
    for adapter in adapters:
        (adapter / "special_tokens_map.json").write_text(special_tokens)
    with pytest.raises(UserError, match="513 tokens, but the adapter's embedding has 512 rows"):
        merge_lora(base, adapters, Output(tmp_path / "again"))


def test_a_whole_tensor_replaces_what_earlier_adapters_added(tmp_path, tiny_checkpoint):
    table = torch.randn(50, 24)
    key = "base_model.model.lm_head"
    on_head = plain_adapter(tmp_path / "a", factors(key, 50))
    new_head = plain_adapter(tmp_path / "b", {f"{key}.weight": table})
    base = tiny_checkpoint()
    merge_lora(base, [on_head, new_head], Output(tmp_path / "replaced"))
    assert torch.equal(read_weights(tmp_path / "replaced")[HEAD], table)
    merge_lora(base, [new_head, on_head], Output(tmp_path / "added"))
    expected = table + 2 * product(factors(key, 50), key)
    torch.testing.assert_close(read_weights(tmp_path / "added")[HEAD], expected)


def test_raw_training_names_are_the_same_adapter(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint()
    table = torch.randn(50, 24)
    clean = factors() | {"base_model.model.lm_head.weight": table}
    raw = factors(middle=".default") | {
        "base_model.model.lm_head.modules_to_save.default.weight": table,
        "base_model.model.lm_head.original_module.weight": torch.zeros(50, 24),
        f"{Q_PROJ}.base_layer.weight": read_weights(base)[Q_WEIGHT],
    }
    wrapped = {f"module.{key}": value for key, value in raw.items()}

    def merged_content(name: str, tensors: dict[str, torch.Tensor], file: str) -> str:
        adapter = plain_adapter(tmp_path / name, tensors, file)
        merge_lora(base, [adapter], Output(tmp_path / f"{name}-out"))
        return manifest(tmp_path / f"{name}-out")["content"]

    expected = merged_content("clean", clean, "adapter_model.bin")
    assert merged_content("raw", raw, "pytorch_model.bin") == expected
    assert merged_content("wrapped", wrapped, "pytorch_model.bin") == expected


def test_fan_in_fan_out_changes_nothing_as_in_peft(tmp_path, tiny_checkpoint):
    """It is for GPT-2's layers; PEFT ignores it where a layer is a linear."""
    base = tiny_checkpoint()
    peft_adapter(base, tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"fan_in_fan_out": True}))
    merge_lora(base, [tmp_path / "a"], Output(tmp_path / "out"))
    expected = open_in_peft(base, tmp_path / "a")
    with torch.no_grad():
        merged = open_in_transformers(tmp_path / "out")(TOKENS).logits
        assert_same_logits(merged, expected(TOKENS).logits)


def test_keys_that_say_which_layers_were_adapted_change_no_merge(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint()
    keys = {"layers_to_transform": [0], "exclude_modules": ["lm_head"], "bias": "all"}
    merge_lora(base, [plain_adapter(tmp_path / "a", factors())], Output(tmp_path / "plain"))
    chosen = plain_adapter(tmp_path / "b", factors(), **keys)
    merge_lora(base, [chosen], Output(tmp_path / "chosen"))
    plain = read_weights(tmp_path / "plain")[Q_WEIGHT]
    assert torch.equal(read_weights(tmp_path / "chosen")[Q_WEIGHT], plain)


def test_a_tied_base_is_untied_by_an_adapter_on_its_head(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint(tie_embeddings=True)
    adapter = plain_adapter(tmp_path / "a", factors("base_model.model.lm_head", 50))
    merge_lora(base, [adapter], Output(tmp_path / "out"))
    embedding = read_weights(base)[EMBEDDING]
    merged = read_weights(tmp_path / "out")
    assert torch.equal(merged[EMBEDDING], embedding)
    assert not torch.equal(merged[HEAD], embedding)
    assert not read_config(tmp_path / "out").tie_embeddings
    assert load_model(tmp_path / "out")


def test_metas_layout_holds_the_same_merged_weights(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint()
    adapter = plain_adapter(tmp_path / "a", factors())
    out = tmp_path / "meta"
    merge_lora(base, [adapter], Output(tmp_path / "hf"))
    flags = ["--format", "meta", "--shards", "3"]
    run_convert("merge-lora", "--base", base, "--lora", adapter, "--output", out, *flags)
    assert manifest(out)["content"] == manifest(tmp_path / "hf")["content"]


def test_the_report_has_the_change_and_that_merged_equals_unmerged(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint(dtype=torch.float16)
    adapter = plain_adapter(tmp_path / "a", factors())
    report = merge_lora(base, [adapter], Output(tmp_path / "out"))
    weight = read_weights(base)[Q_WEIGHT].float()
    change = (2 * product(factors())).norm() / weight.norm()
    assert [entry.name for entry in report.weights] == [Q_WEIGHT]
    assert report.weights[0].change == pytest.approx(change.item(), rel=1e-5)
    assert 0 < report.weights[0].deviation < 2e-3
    assert report.conversion.num_tensors == 21
    assert "1 products and 0 whole tensors, each used once" in str(report)


def test_an_adapter_without_effect_is_a_warning(tmp_path, tiny_checkpoint):
    untrained = {name: tensor * ("lora_A" in name) for name, tensor in factors().items()}
    adapter = plain_adapter(tmp_path / "a", untrained)
    report = merge_lora(tiny_checkpoint(), [adapter], Output(tmp_path / "out"))
    assert "warning: 1 of 1 modules did not change" in str(report)


def test_several_adapters_may_be_separated_by_commas(tmp_path: Path, tiny_checkpoint):
    """Chinese-LLaMA-Alpaca's script takes them so, with names of its own."""
    base = tiny_checkpoint()
    adapters = [plain_adapter(tmp_path / name, factors()) for name in "ab"]
    merge_lora(base, adapters, Output(tmp_path / "expected"))
    names = ",".join(str(adapter) for adapter in adapters)
    flags = ["--base_model", base, "--lora_model", names, "--output_dir", tmp_path / "out"]
    run_convert("merge-lora", *flags, "--output_type", "huggingface")
    expected = read_weights(tmp_path / "expected")[Q_WEIGHT]
    assert torch.equal(read_weights(tmp_path / "out")[Q_WEIGHT], expected)
