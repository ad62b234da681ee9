"""--dtype int8: a checkpoint of any dtype is quantized while it is read."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minillama.checkpoint.hf_writer import save_model
from minillama.errors import UserError
from minillama.generation.api import load
from minillama.generation.loading import LoadOptions, load_engine
from minillama.int8_layers import Int8Linear
from minillama.lora import LoraConfig, add_lora, save_adapter
from minillama.model import Llama
from tests.conftest import random_model
from tests.memory import peak_growth

WIDE = {
    "dim": 512,
    "n_layers": 12,
    "n_heads": 8,
    "n_kv_heads": 8,
    "head_dim": 64,
    "ffn_dim": 1376,
    "vocab_size": 2000,
}


def load_int8(directory: Path) -> Llama:
    options = LoadOptions(str(directory), dtype="int8", device="cpu")
    return load_engine(options, needs_text=False).model


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_rounded_weights(
    tiny_checkpoint: Callable[..., Path], tied: bool
) -> None:
    """The same model with the dequantized weights in their places, in fp32."""
    model = load_int8(tiny_checkpoint(tie_embeddings=tied))
    rounded = random_model(tie_embeddings=False).eval()
    rounded.model.embed_tokens.weight.data = model.model.embed_tokens.weight.float()
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            weight = module.weight.float() * module.scales.float().unsqueeze(1)
            rounded.get_submodule(name).weight.data = weight
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = model.logits(model(tokens)).float()
    expected = rounded.logits(rounded(tokens))
    assert (logits - expected).norm() / expected.norm() < 0.03  # bf16 against fp32


def test_the_checkpoints_dtype_does_not_matter(tiny_checkpoint: Callable[..., Path]) -> None:
    """bf16 weights are quantized to the same numbers whatever file they are in."""
    in_bf16 = load_int8(tiny_checkpoint("bf16", dtype=torch.bfloat16))
    in_fp32 = load_int8(tiny_checkpoint("fp32"))
    for (name, a), (_, b) in zip(
        in_bf16.named_parameters(), in_fp32.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_generation_from_python(inputs: Path) -> None:
    """The fused forms of the other ops take what int8 linears return."""
    loaded = load(inputs / "base", dtype="int8", device="cpu")
    assert loaded.model.lm_head.weight.dtype == torch.int8
    assert isinstance(loaded.generate("the", max_new_tokens=4, greedy=True), str)


def test_a_weight_that_is_not_finite_is_named(tiny_checkpoint: Callable[..., Path]) -> None:
    directory = tiny_checkpoint()
    model = random_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 2] = float("nan")
    save_model(model, directory)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.scales holds NaN"):
        load_int8(directory)


def test_an_adapter_is_refused_with_the_command_that_merges_it(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_checkpoint()
    model = random_model()
    config = LoraConfig(rank=2, alpha=4.0, targets=("q_proj",))
    add_lora(model, config, torch.Generator().manual_seed(0))
    save_adapter(model, config, tmp_path / "adapter", str(base))
    options = LoadOptions(str(base), lora=(str(tmp_path / "adapter"),), dtype="int8")
    with pytest.raises(UserError, match=r"merge it first: python convert.py merge-lora --base"):
        load_engine(options, needs_text=False)


def test_the_whole_16_bit_model_never_exists(tiny_checkpoint: Callable[..., Path]) -> None:
    """38 million weights: 38 MB as int8, 76 MB as they are in the file."""
    directory = tiny_checkpoint(dtype=torch.bfloat16, **WIDE)
    num_linear = 12 * (4 * 512 * 512 + 3 * 512 * 1376) + 2000 * 512
    embedding = 2 * 2000 * 512
    head_in_fp32 = 4 * 2000 * 512  # while it is quantized: its values, their quotients
    load_int8(directory)  # imports
    growth = peak_growth(lambda: load_int8(directory))
    assert growth < num_linear + embedding + 4 * head_in_fp32
    assert growth < 0.8 * 2 * num_linear
