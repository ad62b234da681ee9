"""The forms of `linear` and `attention` that decoding uses: packed weights, ragged rows."""

from pathlib import Path

import pytest
import torch
from torch import nn

from minillama import ops
from minillama.generation.config import GenerationConfig
from minillama.generation.decode import Completion, decode
from minillama.generation.engine import Engine
from minillama.generation.sampling import Sampling
from minillama.model import Llama
from minillama.ops import column_tiles, cpu_linear, fused_attention, reference
from minillama.tokenizer import open_tokenizer
from tests.conftest import TINY, random_model

GREEDY, SAMPLED = Sampling(temperature=0.0), Sampling(temperature=1.3, top_p=0.9)


CAN_PACK_BF16 = torch.cpu._is_avx512_supported()  # oneDNN refuses to pack bf16 elsewhere
HAS_TILES = "fbgemm" in torch.backends.quantized.supported_engines
NEEDS_TILES = pytest.mark.skipif(
    not HAS_TILES, reason="this torch has no FBGEMM, which multiplies tiles"
)
PROMPTS = [[1, 7, 9], [1], [1, 4, 4, 8, 30, 2, 11, 19, 3, 5], [1, 7, 9, 13], [5] * 20]


def together(
    model: Llama,
    prompts: list[list[int]],
    room: int,
    sampling: Sampling,
    stop: tuple[int, ...] = (),
    seed: int | None = 3,
) -> list[Completion]:
    answers = [Completion(prompt, room) for prompt in prompts]
    assert all(answer in answers for answer in decode(model, answers, sampling, stop, seed))
    return answers


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 15, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("units", [True, False], ids=["16-bit units", "none"])
def test_every_form_of_the_linear_is_its_formula_rounded_once(
    rows: int, dtype: torch.dtype, bias: bool, units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any rows, dtype and CPU; large weights and small ones."""
    monkeypatch.setattr(cpu_linear, "has_bf16_units", lambda: units)
    monkeypatch.setattr(cpu_linear, "BLOCK", 64 * 20)  # blocks of 20, 20 and 8 rows of W
    generator = torch.Generator().manual_seed(rows)
    x, weight, b = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((rows, 1, 64), (48, 64), (48,))
    )
    exact = x.double() @ weight.double().T + (b.double() if bias else 0)
    as_it_is, shuffled, tiled = (nn.Linear(64, 48) for _ in range(3))
    for linear in (as_it_is, shuffled, tiled):
        linear.weight = nn.Parameter(weight, requires_grad=False)
    forms = [as_it_is]
    if dtype is torch.float32 or CAN_PACK_BF16:
        monkeypatch.setattr(cpu_linear, "packing_gains", lambda weight: True)
        cpu_linear.pack_weights(shuffled, num_rows=2)
        assert shuffled.weight.is_mkldnn
        assert torch.equal(shuffled.weight.to_dense(), weight)
        forms.append(shuffled)
    if HAS_TILES:
        monkeypatch.setattr(column_tiles, "WIDTHS", (32, 16))
        cpu_linear.pack_weights(tiled, num_rows=1)
        assert tiled.weight.shape == (3, 64, 16)
        assert torch.equal(column_tiles.join(tiled.weight), weight)
        forms.append(tiled)
    for linear in forms:
        with torch.inference_mode():
            y = cpu_linear.linear(x, linear.weight, b if bias else None)
        assert (y.shape, y.dtype) == ((rows, 1, 48), dtype)
        assert (y.double() - exact).abs().max() <= max(
            torch.finfo(dtype).eps, 1e-6
        ) * exact.abs().max()


@pytest.mark.parametrize(
    ("dtype", "units", "packs"),
    [
        (torch.bfloat16, True, True),
        (torch.bfloat16, False, False),
        (torch.float16, True, False),
        (torch.float32, True, True),
        (torch.float32, False, True),
    ],
)
def test_weights_are_packed_where_it_gains(
    dtype: torch.dtype, units: bool, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype is torch.bfloat16 and packs and not CAN_PACK_BF16:
        pytest.skip("this CPU has no AVX-512, and oneDNN cannot pack bf16 without it")
    monkeypatch.setattr(cpu_linear, "has_bf16_units", lambda: units)
    monkeypatch.setattr(cpu_linear, "LARGE", TINY.dim**2 + 1)
    model = random_model().to(dtype)
    model.lm_head.weight = model.model.embed_tokens.weight
    layer, embedding = model.model.layers[0], model.lm_head.weight
    ops.pack_weights(model, num_rows=2)
    assert layer.mlp.gate_proj.weight.is_mkldnn is packs
    assert layer.self_attn.q_proj.weight.is_mkldnn is (packs and dtype == torch.bfloat16)  # small
    assert model.lm_head.weight is embedding, "shared with the embedding"
    once = layer.mlp.gate_proj.weight
    ops.pack_weights(model, num_rows=3)
    assert layer.mlp.gate_proj.weight is once


@NEEDS_TILES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_form_of_the_weights_follows_the_number_of_sequences(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From plain to tiles, to packed or plain, and back: the numbers stay, and no step is done
    twice. A weight without a width that divides it goes on as for several sequences."""
    monkeypatch.setattr(cpu_linear, "LARGE", 1)
    model = random_model().to(dtype)
    up_proj = model.model.layers[0].mlp.up_proj
    numbers = up_proj.weight.clone()
    monkeypatch.setattr(column_tiles, "WIDTHS", (len(numbers) // 2,))
    packs = cpu_linear.packing_gains(numbers)

    ops.pack_weights(model, num_rows=1)
    tiles = up_proj.weight
    assert len(tiles) == 2
    assert torch.equal(column_tiles.join(tiles), numbers)
    ops.pack_weights(model, num_rows=1)
    assert up_proj.weight is tiles
    q_proj = model.model.layers[0].self_attn.q_proj.weight
    assert q_proj.shape[0] % (len(numbers) // 2) != 0, "no tile is as wide as this"
    assert q_proj.is_mkldnn is packs

    ops.pack_weights(model, num_rows=2)
    assert up_proj.weight.is_mkldnn is packs
    assert torch.equal(up_proj.weight.to_dense(), numbers)
    ops.pack_weights(model, num_rows=1)
    assert torch.equal(column_tiles.join(up_proj.weight), numbers)


def test_a_weight_is_cut_by_the_largest_width_that_divides_its_rows() -> None:
    """A weight that none divides, or of another device or dtype, is not cut."""
    widths = {out: column_tiles._width_for(out) for out in (32_000, 576, 288, 100, 4096)}
    assert widths == {32_000: 256, 576: 64, 288: 32, 100: 0, 4096: 256}
    weight = torch.empty(256, 8)
    assert column_tiles.can_tile(weight) is HAS_TILES
    for other in (weight[:100], weight.double(), weight.to("meta")):
        assert not column_tiles.can_tile(other)


@pytest.mark.parametrize("num_rows", [pytest.param(1, marks=NEEDS_TILES), 2])
def test_packed_weights_give_the_same_texts_and_are_for_the_fused_linear_only(
    num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_linear, "LARGE", 1)
    monkeypatch.setattr(column_tiles, "WIDTHS", (16, 8, 4, 2))
    model = random_model()
    as_it_is = model.lm_head.weight
    try:
        ops.choose("reference")
        ops.pack_weights(model, num_rows)
        assert model.lm_head.weight is as_it_is
        ops.choose("auto")
        before = [answer.ids for answer in together(model, PROMPTS, 6, GREEDY)]
        ops.pack_weights(model, num_rows)
        assert model.lm_head.weight.is_mkldnn is (num_rows > 1)
        assert model.lm_head.weight is not as_it_is
        assert [answer.ids for answer in together(model, PROMPTS, 6, GREEDY)] == before
        with pytest.raises(AssertionError, match="take gradients before"):
            model.lm_head(
                torch.ones(1, TINY.dim, requires_grad=True)
            )  # both products would give none, in silence
    finally:
        ops.choose("")


@pytest.mark.parametrize("units", [True, False], ids=["16-bit units", "none"])
def test_a_16_bit_linear_is_trained_by_the_cpus_own_products_where_it_has_them(
    units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_linear, "has_bf16_units", lambda: units)
    monkeypatch.setattr(cpu_linear, "BLOCK", 64 * 20)  # blocks of 20, 20 and 8 rows of W
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((40, 64), (48, 64), (40, 48))
    )
    y = cpu_linear.linear(x.requires_grad_(), weight.requires_grad_())
    assert ("Linear16" in y.grad_fn.name()) is not units
    y.backward(dy)
    for found, exact in (
        (x.grad, dy.double() @ weight.double()),
        (weight.grad, dy.double().T @ x.double()),
    ):
        assert (found.double() - exact).norm() <= 4e-3 * exact.norm()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("frozen", [False, True])
def test_an_fp32_linear_is_trained_by_onednn_where_that_gains(
    frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x is not contiguous, and is not kept for a weight without a gradient."""
    monkeypatch.setattr(cpu_linear, "onednn_gains", lambda: True)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, dy = (
        torch.randn(shape, generator=generator)
        for shape in ((2, 64, 20), (48, 64), (48,), (2, 20, 48))
    )
    x = x.transpose(1, 2).requires_grad_()
    weight.requires_grad_(not frozen)
    bias.requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = cpu_linear.linear(x, weight, bias)
    assert "Linear32" in y.grad_fn.name()
    assert len(kept) == (1 if frozen else 2)
    y.backward(dy)
    exact_x, exact_w, exact_dy = x.detach().double(), weight.detach().double(), dy.double()
    for found, exact in (
        (y.detach(), exact_x @ exact_w.T + bias.detach().double()),
        (x.grad, exact_dy @ exact_w),
        (weight.grad, torch.einsum("bto,bti->oi", exact_dy, exact_x)),
        (bias.grad, exact_dy.sum((0, 1))),
    ):
        if found is weight.grad and frozen:
            assert found is None
            continue
        assert (found.double() - exact).norm() <= 1e-6 * exact.norm()


def test_a_mask_that_decoding_made_serves_where_gradients_are_asked_for() -> None:
    lengths, (q, k, v) = (
        torch.tensor([3, 5]),
        (torch.randn(2, n, 4, 8, generator=torch.Generator().manual_seed(n)) for n in (2, 5, 5)),
    )
    with torch.inference_mode():
        before = fused_attention.attention(q, k, v, None, lengths)
    after = fused_attention.attention(q.requires_grad_(), k, v, None, lengths)
    after.sum().backward()
    assert torch.equal(after, before)


@pytest.mark.parametrize(
    ("beams", "completions", "packed"), [(1, 1, False), (3, 1, True), (1, 2, True)]
)
def test_an_engine_packs_before_its_first_completion(
    beams: int, completions: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In tiles for one sequence, and in oneDNN's order for several."""
    monkeypatch.setattr(cpu_linear, "LARGE", 1)
    monkeypatch.setattr(column_tiles, "WIDTHS", (2,))
    tokenizer = open_tokenizer(Path(__file__).parent / "golden/model")
    config = GenerationConfig(template="none", greedy=True, max_new_tokens=3, num_beams=beams)
    engine = Engine(random_model(), tokenizer, config)
    list(engine.stream([engine.new_completion([1, 5]) for _ in range(completions)], seed=0))
    assert engine.model.lm_head.weight.is_mkldnn is (packed or not HAS_TILES)
    assert engine.model.lm_head.weight.dim() == (3 if HAS_TILES and not packed else 2)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(
    "attention", [fused_attention.attention, reference.attention], ids=["fused", "reference"]
)
def test_attention_over_rows_of_different_length_is_attention_over_each(T: int, attention) -> None:
    q, k, v = (
        torch.randn(4, n, heads, 8, generator=torch.Generator().manual_seed(n))
        for n, heads in ((T, 6), (11, 3), (11, 3))
    )
    lengths = [T, 11, 7, 4]
    together = attention(q, k, v, None, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        part = slice(row, row + 1)
        assert torch.allclose(
            together[part],
            reference.attention(q[part], k[part, :length], v[part, :length]),
            atol=1e-6,
        )


@pytest.mark.parametrize(("rows", "copies"), [(4, False), (5, True)])
def test_few_rows_of_bf16_are_multiplied_without_a_copy_of_the_weight(
    rows: int, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_linear, "has_bf16_units", lambda: False)
    called = []
    monkeypatch.setattr(cpu_linear, "linear_in_fp32", lambda *inputs: called.append(inputs))
    x = torch.ones(rows, 8).bfloat16()
    with torch.inference_mode():
        cpu_linear.linear(x, torch.ones(3, 8).bfloat16())
    assert bool(called) is copies
    called.clear()
    cpu_linear.linear(x, torch.ones(3, 8).bfloat16())
    assert called, "training rounds once, whatever the number of rows"
