"""Chapter: merging LoRA. peft's merge_and_unload is the oracle; every key is used once, the sum is rounded once."""

import json
from pathlib import Path

import pytest
import torch

import convert
from minillama.checkpoint.hf_format import load_model, open_weights
from minillama.conversion.checksums import manifest
from minillama.conversion.merge import merge_lora, read_adapter
from minillama.conversion.writer import Output
from minillama.errors import UserError
from minillama.hf_config import read_config

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: entry.read() for name, entry in open_weights(directory).items()}


def peft_adapter(
    base: Path, directory: Path, safe: bool = True, rows: int = 0, seed: int = 0, **lora
):
    """An adapter with random factors, saved by peft; returns peft's model."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(base, torch_dtype="auto")
    if rows:
        model.resize_token_embeddings(rows)
    model = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LINEARS} | lora)
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).to(
                parameter.dtype
            )
    model.save_pretrained(directory, safe_serialization=safe, save_embedding_layers=False)
    return model


def plain_adapter(
    directory: Path, tensors: dict[str, torch.Tensor], file: str = "adapter_model.bin", **config
) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config)
    )
    torch.save(tensors, directory / file)
    return directory


def factors(
    key: str = Q, out: int = 24, columns: int = 24, middle: str = "", r: int = 2
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(key))
    return {
        f"{key}.lora_A{middle}.weight": torch.randn(r, columns, generator=generator),
        f"{key}.lora_B{middle}.weight": torch.randn(out, r, generator=generator),
    }


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
    found = weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_logits_of_the_merged_model_equal_pefts_unmerged(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint()
    model = peft_adapter(base, tmp_path / "adapter").eval()
    merge_lora(base, [tmp_path / "adapter"], Output(tmp_path / "out"))
    tokens = torch.arange(12)[None]
    ours = load_model(tmp_path / "out")
    torch.testing.assert_close(
        ours.logits(ours(tokens)), model(tokens).logits, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("wanted", [None, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_adapters_are_summed_in_fp32_and_rounded_once(tmp_path, tiny_checkpoint, dtype, wanted):
    base = tiny_checkpoint(dtype=dtype)
    adapters = [
        plain_adapter(tmp_path / name, factors() | factors("model.layers.1.mlp.up_proj", 42))
        for name in "ab"
    ]
    merge_lora(base, adapters, Output(tmp_path / "out", dtype=wanted))
    dtype = wanted or dtype
    name = "model.layers.0.self_attn.q_proj.weight"
    parts = torch.load(tmp_path / "a" / "adapter_model.bin", weights_only=True)
    exact = (
        weights(base)[name].double()
        + 4 * parts[f"{Q}.lora_B.weight"].double() @ parts[f"{Q}.lora_A.weight"].double()
    )
    found = weights(tmp_path / "out")[name]
    unit = exact.abs() * torch.finfo(dtype).eps / 2  # half the distance between neighbours, at most
    assert (
        found.dtype == dtype and ((found.double() - exact).abs() <= unit * (1 + 1e-3) + 1e-9).all()
    )


def test_a_grown_vocabulary_of_the_last_adapter_wins(tmp_path, tiny_checkpoint, shared):
    base = tiny_checkpoint(vocab_size=500)
    whole = {name: torch.randn(rows, 24) for name, rows in (("a", 512), ("b", 512))}
    adapters = []
    for name, table in whole.items():
        adapters.append(
            plain_adapter(
                tmp_path / name,
                factors()
                | {
                    "base_model.model.model.embed_tokens.weight": table,
                    "base_model.model.lm_head.weight": table + 1,
                },
            )
        )
        (adapters[-1] / "tokenizer.model").write_bytes(
            (shared / "models/stories260K/tokenizer.model").read_bytes()
        )
    merge_lora(base, adapters, Output(tmp_path / "out"))
    found = weights(tmp_path / "out")
    assert torch.equal(found[EMBEDDING], whole["b"]) and torch.equal(found[HEAD], whole["b"] + 1)
    assert (
        read_config(tmp_path / "out").vocab_size == 512
        and (tmp_path / "out" / "tokenizer.model").is_file()
    )
    assert load_model(tmp_path / "out")
    for adapter in adapters:
        (adapter / "special_tokens_map.json").write_text(
            '{"pad_token": "[PAD]", "eos_token": {"content": "</s>"}}'
        )
    with pytest.raises(UserError, match="513 pieces, but the adapter's embedding has 512 rows"):
        merge_lora(base, adapters, Output(tmp_path / "again"))


def test_a_whole_tensor_replaces_what_earlier_adapters_added(tmp_path, tiny_checkpoint):
    table, key = torch.randn(50, 24), "base_model.model.lm_head"
    first = plain_adapter(tmp_path / "a", factors(key, 50))
    second = plain_adapter(tmp_path / "b", {f"{key}.weight": table})
    base = tiny_checkpoint()
    merge_lora(base, [first, second], Output(tmp_path / "replaced"))
    assert torch.equal(weights(tmp_path / "replaced")[HEAD], table)
    merge_lora(base, [second, first], Output(tmp_path / "added"))
    product = factors(key, 50)[f"{key}.lora_B.weight"] @ factors(key, 50)[f"{key}.lora_A.weight"]
    torch.testing.assert_close(weights(tmp_path / "added")[HEAD], table + 2 * product)


def test_raw_training_names_are_the_same_adapter(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint()
    table = torch.randn(50, 24)
    clean = factors() | {"base_model.model.lm_head.weight": table}
    raw = factors(middle=".default") | {
        "base_model.model.lm_head.modules_to_save.default.weight": table,
        "base_model.model.lm_head.original_module.weight": torch.zeros(50, 24),
        f"{Q}.base_layer.weight": weights(base)["model.layers.0.self_attn.q_proj.weight"],
    }
    named = {f"module.{key}": value for key, value in raw.items()}
    contents = set()
    for name, tensors, file in (
        ("clean", clean, "adapter"),
        ("raw", raw, "pytorch"),
        ("named", named, "pytorch"),
    ):
        merge_lora(
            base,
            [plain_adapter(tmp_path / name, tensors, f"{file}_model.bin")],
            Output(tmp_path / f"{name}-out"),
        )
        contents.add(manifest(tmp_path / f"{name}-out")["content"])
    assert len(contents) == 1


def test_fan_in_fan_out_transposes_the_product(tmp_path, tiny_checkpoint):
    base, name = tiny_checkpoint(), "model.layers.0.self_attn.q_proj.weight"
    tensors = factors()
    merge_lora(
        base,
        [plain_adapter(tmp_path / "a", tensors, fan_in_fan_out=True)],
        Output(tmp_path / "out"),
    )
    expected = (
        weights(base)[name] + 2 * (tensors[f"{Q}.lora_B.weight"] @ tensors[f"{Q}.lora_A.weight"]).T
    )
    torch.testing.assert_close(weights(tmp_path / "out")[name], expected)


def test_keys_that_say_which_layers_were_adapted_change_no_merge(tmp_path, tiny_checkpoint):
    base, name = tiny_checkpoint(), "model.layers.0.self_attn.q_proj.weight"
    plain, chosen = (
        plain_adapter(tmp_path / "a", factors()),
        plain_adapter(
            tmp_path / "b",
            factors(),
            layers_to_transform=[0],
            exclude_modules=["lm_head"],
            bias="all",
        ),
    )
    merge_lora(base, [plain], Output(tmp_path / "plain"))
    merge_lora(base, [chosen], Output(tmp_path / "chosen"))
    assert torch.equal(weights(tmp_path / "plain")[name], weights(tmp_path / "chosen")[name])


def test_a_tied_base_is_untied_by_an_adapter_on_its_head(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint(tie_embeddings=True)
    merge_lora(
        base,
        [plain_adapter(tmp_path / "a", factors("base_model.model.lm_head", 50))],
        Output(tmp_path / "out"),
    )
    before, after = weights(base), weights(tmp_path / "out")
    assert torch.equal(after[EMBEDDING], before[EMBEDDING]) and not torch.equal(
        after[HEAD], before[EMBEDDING]
    )
    assert not read_config(tmp_path / "out").tie_embeddings and load_model(tmp_path / "out")


def test_metas_layout_holds_the_same_merged_weights(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint()
    adapter = plain_adapter(tmp_path / "a", factors())
    merge_lora(base, [adapter], Output(tmp_path / "hf"))
    convert.main(
        [
            "merge-lora",
            "--base",
            str(base),
            "--lora",
            str(adapter),
            "--output",
            str(tmp_path / "meta"),
            "--format",
            "meta",
            "--shards",
            "3",
        ]
    )
    assert manifest(tmp_path / "meta")["content"] == manifest(tmp_path / "hf")["content"]


def test_the_report_says_how_much_changed_and_that_merged_equals_unmerged(
    tmp_path, tiny_checkpoint, capsys
):
    base, tensors = tiny_checkpoint(dtype=torch.float16), factors()
    report = merge_lora(base, [plain_adapter(tmp_path / "a", tensors)], Output(tmp_path / "out"))
    delta = 2 * tensors[f"{Q}.lora_B.weight"] @ tensors[f"{Q}.lora_A.weight"]
    weight = weights(base)["model.layers.0.self_attn.q_proj.weight"].float()
    assert len(report) == 1 and report[0].change == pytest.approx(
        (delta.norm() / weight.norm()).item(), rel=1e-5
    )
    assert 0 < report[0].deviation < 2e-3
    assert "1 products and 0 whole tensors, each used once" in capsys.readouterr().out
    untrained = {key: value * ("lora_A" in key) for key, value in tensors.items()}
    merge_lora(base, [plain_adapter(tmp_path / "b", untrained)], Output(tmp_path / "out2"))
    assert "warning: 1 of 1 modules did not change" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (
            factors(),
            {"use_dora": True},
            "use_dora = True is not supported; merge the adapter with peft",
        ),
        (factors() | {f"{Q}.lora_magnitude_vector": torch.ones(24)}, {}, "DoRA is not supported"),
        (factors(), {"peft_type": "IA3"}, "peft_type = 'IA3' is not supported"),
        (
            factors(),
            {"r": 3},
            r"lora_A is \(2, 24\) and lora_B \(24, 2\), adapter_config.json says rank 3",
        ),
        (
            factors(),
            {"r": "many"},
            r"adapter_config\.json: a value is wrong or of the wrong type .*'many'",
        ),
        (factors(), {"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
        (
            factors(),
            {"alora_invocation_tokens": [1]},
            r"alora_invocation_tokens = \[1\] is not supported",
        ),
        (
            {f"{Q}.lora_A.weight": torch.zeros(2, 24)},
            {},
            "q_proj has lora_A without its other half",
        ),
        (factors() | {f"{Q}.lora_B.bias": torch.zeros(24)}, {}, "not a LoRA key"),
        (factors() | factors(middle=".other"), {}, "a second value .* more than one adapter"),
        (
            factors("base_model.model.model.layers.9.self_attn.q_proj"),
            {},
            r"layers\.9\..*: the base has no such tensor \(did you mean",
        ),
        (factors(out=12), {}, r"the adapter makes \(12, 24\), the base has \(24, 24\)"),
        (
            {"base_model.model.score.weight": torch.zeros(2, 24)},
            {},
            "score.weight: the base has no such tensor",
        ),
        (
            {"base_model.model.lm_head.weight": torch.zeros(40, 24)},
            {},
            r"lm_head.weight is \(40, 24\), in the base \(50, 24\)",
        ),
        (
            {"base_model.model.model.embed_tokens.weight": torch.zeros(60, 24)},
            {},
            "lm_head.weight is",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    tmp_path, tiny_checkpoint, tensors, config, message
):
    adapter = plain_adapter(tmp_path / "a", tensors, **config)
    with pytest.raises(UserError, match=message):
        merge_lora(tiny_checkpoint(), [adapter], Output(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_adapter_directory_needs_its_files(tmp_path, tiny_checkpoint):
    (tmp_path / "a").mkdir()
    with pytest.raises(
        UserError, match=r"adapter_config\.json: no such file; an adapter is a directory"
    ):
        read_adapter(tmp_path / "a")
    for content, said in (
        ("{", "not valid JSON"),
        ("[]", "holds no JSON object"),
        ('{"r": 8}', "key 'lora_alpha' is missing"),
    ):
        (tmp_path / "a" / "adapter_config.json").write_text(content)
        with pytest.raises(UserError, match=said):
            read_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 8}')
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors"):
        read_adapter(tmp_path / "a")


def test_a_vocabulary_that_was_not_saved_is_noticed(tmp_path, tiny_checkpoint, shared):
    adapter = plain_adapter(tmp_path / "a", factors())
    (adapter / "tokenizer.model").write_bytes(
        (shared / "models/stories260K/tokenizer.model").read_bytes()
    )
    with pytest.raises(
        UserError,
        match="512 pieces, but the embedding has 50 rows and the adapter brings no larger one",
    ):
        merge_lora(tiny_checkpoint(), [adapter], Output(tmp_path / "out"))


def test_quantized_bases_are_refused(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint()
    raw = json.loads((base / "config.json").read_text()) | {"quantization_config": {"bits": 4}}
    (base / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="quantization_config"):
        merge_lora(base, [plain_adapter(tmp_path / "a", factors())], Output(tmp_path / "out"))
