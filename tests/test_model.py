"""The model: the logits of transformers, and the laws that make it a LLaMA."""

from pathlib import Path

import pytest
import torch

from minillama import ops
from minillama.checkpoint.hf_reader import load_model
from minillama.checkpoint.hf_writer import save_model
from minillama.errors import UserError
from minillama.hf_config import read_config
from minillama.llama_config import RopeScaling, with_layers
from tests.conftest import TINY, random_model, random_tokens
from tests.peers import HF_TINY, LLAMA3, assert_same_logits, open_in_transformers

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


def test_rope_tables_stay_fp32_in_a_16_bit_model() -> None:
    """bf16 has 8 bits: position 257 would stand where 256 does."""
    model = random_model().bfloat16()
    model(random_tokens(1, 8))
    cos, sin = model.rotary.get(model.config, 8, torch.device("cpu"))
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(cos, ops.rope_tables(model.config, 16)[0])


def test_rope_scores_depend_only_on_distance() -> None:
    """<R_m q, R_n k> = <R_(m-n) q, k>: a pair 5 apart scores the same wherever it stands."""
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
    """By hand, a head of 4 at position 1: (x0, x2) turns by 1, (x1, x3) by 10000^(-1/2) = 0.01."""
    cos, sin = ops.rope_tables(TINY, 2)
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    turned = ops.rope(x, cos[1:], sin[1:]).flatten()
    angle = torch.tensor([1.0, 0.01])
    assert torch.allclose(
        turned, torch.stack([angle[0].cos(), -angle[1].sin(), angle[0].sin(), angle[1].cos()])
    )


def test_the_future_cannot_be_seen() -> None:
    """Change the tokens from position 7 on: the hidden states before it stay the same."""
    model, tokens = random_model(), random_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.equal(before[0, :7], after[0, :7])
    assert not torch.isclose(before[0, 7:], after[0, 7:]).all(1).any()


def test_tables_kept_from_a_longer_text_do_not_change_a_shorter_one() -> None:
    """With "dynamic" scaling frequencies depend on the current length, not the longest so far."""
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


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gradients_equal_transformers(tied: bool, tmp_path: Path) -> None:
    """A tied embedding gets the gradient of its two uses."""
    ours = random_model(tie_embeddings=tied)
    save_model(ours, tmp_path)
    theirs = open_in_transformers(tmp_path)
    tokens = random_tokens(2, 20)
    labels = tokens[:, 1:]
    ours.loss_sum(tokens[:, :-1], labels).backward()
    logits = theirs(tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    loss.backward()
    for name, parameter in ours.named_parameters():
        assert_same_logits(parameter.grad, theirs.get_parameter(name).grad)


def test_initial_biases_are_zero() -> None:
    model = random_model(attention_bias=True, mlp_bias=True).initialise()
    biases = [p for name, p in model.named_parameters() if name.endswith(".bias")]
    assert len(biases) == 2 * 7
    assert not any(bool(bias.any()) for bias in biases)
