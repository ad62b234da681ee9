"""NaN and infinity in weights never become text, whichever implementation computes it."""

import math
from pathlib import Path

import pytest
import torch

from minillama import ops
from minillama.checkpoint.hf_reader import first_non_finite
from minillama.checkpoint.hf_writer import save_model
from minillama.errors import UserError
from minillama.generation import loading
from minillama.generation.beam import BeamOptions, beam_search
from minillama.generation.config import GenerationConfig
from minillama.generation.decode import Completion, decode
from minillama.generation.loading import LoadOptions, load_engine
from minillama.generation.sampling import Sampling
from minillama.lora import LoraConfig, add_lora, save_adapter
from tests.conftest import random_model

# torch's attention turns NaN in q and k into finite numbers, so the logits do not show it.
HIDDEN = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("form", ["fused", "reference"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [HIDDEN, "model.embed_tokens.weight", "lm_head.weight"])
def test_broken_weights_are_refused_by_name(
    name: str, value: float, form: str, small_tokenizer, tmp_path: Path
) -> None:
    model = random_model(vocab_size=400)
    with torch.no_grad():
        dict(model.named_parameters())[name][3, 5] = value
    save_model(model, tmp_path / "model", small_tokenizer)
    try:
        with pytest.raises(UserError, match=rf"model: {name} holds NaN or infinity"):
            load_engine(LoadOptions(str(tmp_path / "model"), ops=form))
    finally:
        ops.choose("")


def test_a_broken_adapter_is_refused_by_name(small_tokenizer, tmp_path: Path) -> None:
    save_model(random_model(vocab_size=400), tmp_path / "base", small_tokenizer)
    model = random_model(vocab_size=400)
    lora = LoraConfig(rank=2, alpha=4.0, targets=("q_proj",))
    add_lora(model, lora, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.lora_A[0, 0] = math.nan
    save_adapter(model, lora, tmp_path / "adapter", str(tmp_path / "base"))
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj\.lora_A\S* holds NaN"):
        load_engine(LoadOptions(str(tmp_path / "adapter")))


def test_weights_beyond_16_bits_are_refused_though_they_are_finite_in_32(
    small_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(vocab_size=400)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    save_model(model, tmp_path / "model", small_tokenizer)
    assert load_engine(LoadOptions(str(tmp_path / "model")), GenerationConfig(greedy=True))
    monkeypatch.setattr(loading, "compute_dtype", lambda *_: (torch.float16, ""))
    with pytest.raises(UserError, match=r"lm_head\.weight holds NaN .*torch\.float16"):
        load_engine(LoadOptions(str(tmp_path / "model"), dtype="float16"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("search", ["greedy", "sampling", "beams", "sampling beams"])
def test_logits_that_are_not_finite_end_every_search(search: str, value: float) -> None:
    """Numbers can overflow where all weights are finite, so the logits are looked at as well."""
    model = random_model().eval().requires_grad_(False)
    model.lm_head.weight[7, 3] = value
    completion = Completion([1, 4, 9], max_new_tokens=4)
    if search in ("greedy", "sampling"):
        sampling = Sampling(temperature=float(search == "sampling"))
        steps = decode(model, [completion], sampling, seed=0)
    else:
        options = BeamOptions(2, sample=search == "sampling beams")
        steps = beam_search(model, [completion], options, Sampling(), seed=0)
    with pytest.raises(UserError, match="logits are not finite"):
        list(steps)


def test_the_first_broken_parameter_is_named() -> None:
    model = random_model()
    assert first_non_finite(model) == ""
    with torch.no_grad():
        model.model.norm.weight[-1] = -math.inf
    assert first_non_finite(model) == "model.norm.weight"
