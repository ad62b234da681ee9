"""The model: the numbers of transformers, and the laws that make it a LLaMA."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillama import ops
from minillama.checkpoint.hf_reader import load_model
from minillama.checkpoint.hf_writer import save_model
from minillama.errors import UserError
from minillama.hf_config import from_hf, published, read_config, to_hf
from minillama.llama_config import PUBLISHED, RopeScaling, ffn_width, with_layers
from tests.conftest import TINY, random_model, random_tokens
from tests.peers import assert_same_logits, open_in_transformers

HF_TINY = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS = {
    "every query head has its own key": {},
    "three query heads share a key": {"num_key_value_heads": 2},
    "all query heads share a key": {"num_key_value_heads": 1},
    "tied embeddings": {"tie_word_embeddings": True},
    "head size apart from the width": {"head_dim": 12, "num_key_value_heads": 3},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 3},
    "large theta and epsilon": {"rope_theta": 1e6, "rms_norm_eps": 1e-2},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": YARN},
    "yarn with its own slopes": {
        "rope_scaling": YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3}
    },
    "yarn with two mscales": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}},
    "yarn without truncation": {"rope_scaling": YARN | {"truncate": False}},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_transformers(changes: dict, tmp_path: Path) -> None:
    """A checkpoint that transformers made, read by us, within its context and beyond it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**HF_TINY | changes, attn_implementation="eager")
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(float("norm" in name), 0.2)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    for length in (7, 48):
        tokens = random_tokens(2, length)
        with torch.no_grad():
            assert_same_logits(ours.logits(ours(tokens)), theirs(tokens).logits)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"head_dim": 10, "attention_bias": True, "mlp_bias": True},
        {"rope_scaling": RopeScaling("llama3", 4.0, original_max_seq_len=16)},
        {"rope_scaling": RopeScaling("yarn", 4.0, 16)},
        {"rope_scaling": RopeScaling("linear", 2.0)},
        {"rope_scaling": RopeScaling("dynamic", 2.0)},
    ],
    ids=str,
)
def test_transformers_opens_what_we_write(changes: dict, tmp_path: Path) -> None:
    ours, tokens = random_model(**changes), random_tokens(1, 20)
    save_model(ours, tmp_path)
    with torch.no_grad():
        assert_same_logits(open_in_transformers(tmp_path)(tokens).logits, ours.logits(ours(tokens)))
    assert read_config(tmp_path) == ours.config


@pytest.mark.parametrize("name", ["stories260K", "stories260K_untied_sharded"])
def test_logits_of_a_really_trained_llama_equal_transformers(name: str, shared: Path) -> None:
    directory = shared / "models" / name
    ours, theirs = load_model(directory), open_in_transformers(directory)
    tokens = random_tokens(2, 100, vocab_size=512)
    with torch.no_grad():
        assert_same_logits(ours.logits(ours(tokens)), theirs(tokens).logits)


def test_every_published_config_is_read_as_transformers_reads_it_or_refused_by_name(
    shared: Path,
) -> None:
    transformers = pytest.importorskip("transformers")
    for path in sorted((shared / "configs").glob("*.json")):
        if "hidden_size" not in json.loads(path.read_text()):
            with pytest.raises(
                UserError, match=f"{re.escape(path.name)}: key 'hidden_size' is missing"
            ):
                read_config(path)
            continue
        ours, theirs = read_config(path), transformers.LlamaConfig.from_json_file(path)
        assert (
            ours.dim,
            ours.n_layers,
            ours.n_heads,
            ours.n_kv_heads,
            ours.head_dim,
            ours.ffn_dim,
            ours.vocab_size,
        ) == (
            theirs.hidden_size,
            theirs.num_hidden_layers,
            theirs.num_attention_heads,
            theirs.num_key_value_heads,
            theirs.head_dim,
            theirs.intermediate_size,
            theirs.vocab_size,
        ), path.name
        assert (
            ours.max_seq_len,
            ours.norm_eps,
            ours.rope_theta,
            ours.tie_embeddings,
            ours.bos_id,
        ) == (
            theirs.max_position_embeddings,
            theirs.rms_norm_eps,
            theirs.rope_theta,
            theirs.tie_word_embeddings,
            theirs.bos_token_id,
        )
        assert list(ours.eos_ids) == (
            theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
        )
        frequencies = ops.rotary.rope_frequencies(ours, 8)
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
        assert torch.allclose(frequencies, rotary.inv_freq, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "vocab_size", "expected"),
    [
        ("llama1-7b", 32000, 6_738_415_616),
        ("llama1-13b", 32000, 13_015_864_320),
        ("33b", 32000, 32_528_943_616),
        ("65b", 32000, 65_285_660_672),
        ("7b", 32000, 6_738_415_616),
        ("13b", 32000, 13_015_864_320),
        ("34b", 32000, 33_743_970_304),
        ("70b", 32000, 68_976_648_192),
        ("7b", 49953, 6_885_486_592),
        ("chinese-7b", 55296, 6_929_256_448),
        ("chinese-13b", 55296, 13_254_415_360),
    ],
)
def test_published_sizes_have_the_published_parameter_counts(
    name: str, vocab_size: int, expected: int
) -> None:
    assert replace(published(name), vocab_size=vocab_size).parameter_count() == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"head_dim": 10},
    ],
    ids=str,
)
def test_parameter_shapes_are_those_of_the_model(changes: dict) -> None:
    model = random_model(**changes)
    assert {
        name: tuple(p.shape) for name, p in model.named_parameters()
    } == model.config.parameter_shapes()


def test_metas_rule_gives_the_published_mlp_widths() -> None:
    assert [
        ffn_width(4096, 256),
        ffn_width(5120, 256),
        ffn_width(6656, 256),
        ffn_width(8192, 256),
    ] == [11008, 13824, 17920, 22016]
    assert ffn_width(8192, 4096, 1.3) == 28672


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_written_and_read_is_the_same(name: str) -> None:
    assert from_hf(to_hf(PUBLISHED[name])) == PUBLISHED[name]


def test_rope_parameters_is_the_new_spelling_of_rope_theta_and_rope_scaling() -> None:
    """transformers 5 writes one table where transformers 4 wrote two keys."""
    old = HF_TINY | {"rope_theta": 5e5, "rope_scaling": LLAMA3}
    new = {key: value for key, value in HF_TINY.items() if key != "rope_theta"} | {
        "rope_parameters": {"rope_theta": 5e5, **LLAMA3}
    }
    assert from_hf(new) == from_hf(old)


def test_theta_is_ten_thousand_only_where_neither_spelling_gives_it() -> None:
    without = {key: value for key, value in HF_TINY.items() if key != "rope_theta"}
    assert from_hf(without).rope_theta == 10000.0
    assert (
        from_hf(
            without | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
        ).rope_theta
        == 5e5
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"model_type": "mistral"}, "model_type = 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope scaling 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope scaling 'linear' has no factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
            "original_max_position_embeddings",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "wobble": 1}},
            "unknown key ['wobble']",
        ),
        ({"num_key_value_heads": 4}, "n_heads = 6 is not a multiple of n_kv_heads = 4"),
        ({"head_dim": 7}, "head_dim = 7 is odd"),
        ({"hidden_size": "48"}, "wrong type"),
        ({"rms_norm_eps": 0.0}, "norm_eps = 0.0"),
        ({"vocab_size": 0}, "vocab_size = 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_that_cannot_be_honoured_is_refused_by_name(changes: dict, named: str) -> None:
    with pytest.raises(UserError) as error:
        from_hf(HF_TINY | changes)
    assert named in str(error.value)


def test_a_config_file_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        read_config(tmp_path)


def test_an_unknown_size_names_the_closest() -> None:
    with pytest.raises(UserError, match="did you mean '13b'"):
        published("13bb")


def test_rope_tables_stay_fp32_in_a_16_bit_model() -> None:
    """bf16 has 8 bits: position 257 would stand where 256 does."""
    model = random_model().bfloat16()
    model(random_tokens(1, 8))
    cos, sin = model.rotary.get(model.config, 8, torch.device("cpu"))
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(cos, ops.rope_tables(model.config, 16)[0])


def test_rope_scores_depend_only_on_distance() -> None:
    """<R_m q, R_n k> = <R_(m-n) q, k>: the same pair of vectors 5 apart scores the same wherever it stands."""
    cos, sin = ops.rope_tables(TINY, 64)
    q, k = torch.randn(2, 1, 1, 1, 4, generator=torch.Generator().manual_seed(0))

    def score(m: int, n: int) -> float:
        return float(
            (
                ops.rope(q, cos[m : m + 1], sin[m : m + 1])
                * ops.rope(k, cos[n : n + 1], sin[n : n + 1])
            ).sum()
        )

    assert [score(m, m - 5) for m in (5, 20, 63)] == pytest.approx([score(5, 0)] * 3, abs=1e-5)
    assert score(5, 0) != pytest.approx(score(6, 0), abs=1e-3)


def test_rope_turns_the_first_half_of_a_head_against_the_second() -> None:
    """By hand, a head of 4 at position 1: pairs (x0, x2) and (x1, x3), turned by 1 and by 10000^(-1/2) = 0.01."""
    cos, sin = ops.rope_tables(TINY, 2)
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    turned = ops.rope(x, cos[1:], sin[1:]).flatten()
    angle = torch.tensor([1.0, 0.01])
    assert torch.allclose(
        turned, torch.stack([angle[0].cos(), -angle[1].sin(), angle[0].sin(), angle[1].cos()])
    )


def test_the_future_cannot_be_seen() -> None:
    model, tokens = random_model(), random_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.equal(before[0, :7], after[0, :7])
    assert not torch.isclose(before[0, 7:], after[0, 7:]).all(1).any()


def test_tables_kept_from_a_longer_text_do_not_change_a_shorter_one() -> None:
    """With "dynamic" scaling the frequencies depend on the length at hand, not on the longest one so far."""
    changes = {"rope_scaling": RopeScaling("dynamic", 2.0), "max_seq_len": 16}
    fresh, used, tokens = random_model(**changes), random_model(**changes), random_tokens(1, 10)
    used(random_tokens(1, 40))
    assert torch.equal(used(tokens), fresh(tokens))


def test_the_first_layers_of_a_model_are_a_model(tmp_path: Path) -> None:
    whole = random_model(n_layers=3)
    save_model(whole, tmp_path)
    first = load_model(tmp_path, n_layers=2)
    assert [n for n, _ in first.named_parameters()] == list(
        with_layers(whole.config, 2).parameter_shapes()
    )
    assert all(torch.equal(p, whole.get_parameter(name)) for name, p in first.named_parameters())
    with pytest.raises(UserError, match="n_layers = 4"):
        load_model(tmp_path, n_layers=4)


def test_initial_weights_follow_the_seed_and_the_stated_deviation() -> None:
    one, same, other = (
        random_model(dim=120, ffn_dim=400).initialise(torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    weight = one.model.layers[0].mlp.gate_proj.weight
    assert float(weight.detach().std()) == pytest.approx(
        0.02, rel=0.02
    )  # 48,000 draws: the deviation is known to 0.3 %
    assert bool((one.model.norm.weight == 1).all())
    assert torch.equal(weight, same.model.layers[0].mlp.gate_proj.weight)
    assert not torch.equal(weight, other.model.layers[0].mlp.gate_proj.weight)
