"""Weight-only int8: what is rounded, and how far the outputs are from those of the weights."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minillama import int8_layers, ops
from minillama.int8_layers import Int8Linear, quantize_linear
from minillama.model import Linear, Llama
from tests.conftest import TINY


def dequantized(layer: Int8Linear) -> Tensor:
    return layer.weight.float() * layer.scales.float().unsqueeze(1)


def test_a_channel_by_hand() -> None:
    """[1.27, -0.5, 0] has the scale 1.27 / 127 = 0.01, in bf16 0.010009765625."""
    layer = Int8Linear(torch.tensor([[1.27, -0.5, 0.0]]), None)
    assert layer.scales.tolist() == [0.010009765625]
    assert layer.weight.tolist() == [[127, -50, 0]]  # 1.27 / 0.0100098 = 126.88, 49.95


def test_every_weight_is_rounded_by_at_most_half_a_step_or_the_rounding_of_its_scale() -> None:
    weight = torch.randn(64, 96)
    layer = Int8Linear(weight, None)
    step = layer.scales.float().unsqueeze(1)
    clipped = weight.abs().amax(dim=1, keepdim=True) - 127 * step  # a scale that was rounded down
    allowed = torch.maximum(step / 2, clipped) * 1.001
    assert ((dequantized(layer) - weight).abs() <= allowed).all()


def test_a_channel_of_zeros_gives_zeros() -> None:
    layer = Int8Linear(torch.zeros(3, 32), None)
    x = torch.randn(2, 32).bfloat16()
    assert layer(x).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("shape", [(64, 96), (509, 172), (3, 32)], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 32, 33, 100])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_those_of_the_dequantized_weights(
    shape: tuple[int, int], rows: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's kernel where it takes the shape, and by blocks of channels for many rows."""
    monkeypatch.setattr(int8_layers, "BLOCK", 10 * shape[1])
    bias = torch.randn(shape[0]).bfloat16() if has_bias else None
    layer = Int8Linear(torch.randn(shape), bias)
    x = torch.randn(rows, shape[1]).bfloat16()
    expected = x.float() @ dequantized(layer).T
    if bias is not None:
        expected += bias.float()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    error = (y.float() - expected).norm() / expected.norm()
    assert error < 6e-3  # bf16 has 8 bits: 2^-8 = 4e-3 at most for each rounding


def test_the_kernel_is_not_used_for_widths_that_it_cannot_read() -> None:
    """With a width of 172, torch 2.13's kernel reads past the end of a row."""
    layer = Int8Linear(torch.randn(16, 172), None)
    assert not int8_layers._kernel_takes(layer.weight)
    assert int8_layers._kernel_takes(Int8Linear(torch.randn(16, 96), None).weight)


def quantized_model(tied: bool) -> Llama:
    config = replace(TINY, tie_embeddings=tied)
    model = Llama(config).initialise(torch.Generator().manual_seed(0)).bfloat16()
    for name, _ in list(model.named_parameters()):
        quantize_linear(model, name)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_all_linears_are_int8_and_the_rest_stays(tied: bool) -> None:
    model = quantized_model(tied)
    assert not [module for module in model.modules() if isinstance(module, Linear)]
    for name, parameter in model.named_parameters():
        is_int8 = name.endswith("_proj.weight") or name == "lm_head.weight"
        assert parameter.dtype == (torch.int8 if is_int8 else torch.bfloat16), name


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_that_of_the_logits(tied: bool) -> None:
    model = quantized_model(tied)
    tokens = torch.randint(0, TINY.vocab_size, (1, 12), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1)
    labels[0, -3:] = ops.IGNORE
    loss = model.loss_sum(tokens, labels)
    logits = model.logits(model(tokens)).float()
    expected = torch.nn.functional.cross_entropy(logits[0, :9], labels[0, :9], reduction="sum")
    assert torch.allclose(loss, expected, rtol=1e-5)
