"""Batches: every text comes out as it would alone, whatever its neighbours, its prompt's length or the chunks it was read in."""

from pathlib import Path

import pytest
import torch
from torch import nn

from minillama import ops
from minillama.checkpoint.hf_format import load_model
from minillama.errors import UserError
from minillama.generation import decode as decoding
from minillama.generation.cache import Cache
from minillama.generation.config import GenerationConfig
from minillama.generation.decode import Completion, decode, prefill, rope_alpha_for, scale_rope
from minillama.generation.engine import Engine
from minillama.generation.sampling import Sampling
from minillama.llama_config import RopeScaling
from minillama.model import Llama
from minillama.ops import Documents, fused, packed_weights, reference
from minillama.tokenizer import open_tokenizer
from tests.conftest import TINY, generate, random_model, random_tokens

GREEDY, SAMPLED = Sampling(temperature=0.0), Sampling(temperature=1.3, top_p=0.9)
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


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, SAMPLED, Sampling(0.0, repetition_penalty=1.4), Sampling(0.9, 7, 0.8, 1.2)],
    ids=str,
)
@pytest.mark.parametrize("chunk", [512, 4], ids=["read at once", "read in chunks of 4"])
def test_every_text_of_a_batch_is_the_text_it_would_be_alone(
    sampling: Sampling, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlike lengths, and a stop token that ends some texts early: rows leave, and the others move."""
    model = random_model()
    alone = [
        list(generate(model, prompt, 25, sampling, (17, 30, 41), seed=3)) for prompt in PROMPTS
    ]
    assert len({len(ids) for ids in alone}) > 2, "some end early, at different times"
    monkeypatch.setattr(decoding, "CHUNK", chunk)
    answers = together(model, PROMPTS, 25, sampling, (17, 30, 41))
    assert [answer.ids for answer in answers] == alone
    assert [answer.finish_reason for answer in answers] == [
        "length" if len(ids) == 25 else "eos" for ids in alone
    ]


def test_texts_of_a_trained_llama_are_the_same_in_a_batch(shared: Path) -> None:
    directory = shared / "models/stories260K"
    model, tokenizer = load_model(directory), open_tokenizer(directory)
    prompts = [
        [1, *tokenizer.encode(text)]
        for text in ("Once upon a time", "The", "Lily and Tom went to the park with a big red ball")
    ]
    alone = [list(generate(model, prompt, 120, GREEDY, (1, 2))) for prompt in prompts]
    assert [answer.ids for answer in together(model, prompts, 120, GREEDY, (1, 2))] == alone


def test_a_batch_may_hold_more_texts_than_each_has_tokens() -> None:
    model, prompts = random_model(), [[1 + n, 7][: 1 + n % 2] for n in range(8)]
    alone = [list(generate(model, prompt, 3, GREEDY)) for prompt in prompts]
    assert [answer.ids for answer in together(model, prompts, 3, GREEDY)] == alone


@torch.no_grad()
def test_prompts_read_end_to_end_or_in_chunks_leave_what_each_leaves_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Logits, and the cache: long prompts by themselves, the others packed, equal ones once."""
    model = random_model()
    monkeypatch.setattr(decoding, "CHUNK", 8)
    prompts = [*PROMPTS, PROMPTS[0], random_tokens(30).tolist()]
    cache = Cache(model.config, len(prompts), 32, torch.float32, torch.device("cpu"))
    logits = prefill(model, cache, prompts)
    for row, prompt in enumerate(prompts):
        alone = Cache(model.config, 1, 32, torch.float32, torch.device("cpu"))
        hidden = model(torch.tensor([prompt]), cache=alone.extend(len(prompt)))
        assert torch.allclose(logits[row], model.logits(hidden)[0, -1], atol=1e-5)
        for kept, theirs in ((cache.keys, alone.keys), (cache.values, alone.values)):
            assert torch.allclose(
                kept[:, row, :, : len(prompt)], theirs[:, 0, :, : len(prompt)], atol=1e-5
            )
    assert cache.filled == [len(prompt) for prompt in prompts]


def test_equal_prompts_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = random_model(), []
    forward = Llama.forward
    monkeypatch.setattr(
        Llama,
        "forward",
        lambda self, tokens, *rest, **named: (
            read.append(tokens.numel()) or forward(self, tokens, *rest, **named)
        ),
    )
    answers = [Completion([1, 7, 9], 3, number) for number in range(4)]
    list(decode(model, answers, SAMPLED, seed=1))
    assert read == [3, 4, 4]
    assert len({tuple(answer.ids) for answer in answers}) > 1, "each sample has draws of its own"


def test_a_finished_row_costs_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rooms of 2, 5 and 5 tokens: three rows twice, then two."""
    model, rows = random_model(), []
    forward = Llama.forward
    monkeypatch.setattr(
        Llama,
        "forward",
        lambda self, tokens, *rest, **named: (
            rows.append(len(tokens)) or forward(self, tokens, *rest, **named)
        ),
    )
    list(
        decode(model, [Completion([1, 2], 2), Completion([3, 4, 5], 5), Completion([6], 5)], GREEDY)
    )
    assert rows == [1, 3, 2, 2, 2]  # the first is the prompts' one run


def test_a_caller_may_end_a_completion() -> None:
    model = random_model()
    answers = [Completion([1, 7, 9], 10), Completion([4], 10)]
    for answer in decode(model, answers, GREEDY):
        if answer is answers[0] and len(answer.ids) == 3:
            answer.finish("stop")
    assert [len(answer.ids) for answer in answers] == [3, 10]
    assert answers[1].ids == list(generate(model, [4], 10, GREEDY))


@torch.no_grad()
def test_rows_of_unlike_length_take_several_tokens_at_once() -> None:
    """Ragged rows of the cache extended by four tokens each equal each row's whole text."""
    model, lengths = random_model(), [9, 2, 6]
    texts = [random_tokens(length + 4, seed=length).tolist() for length in lengths]
    cache = Cache(model.config, 3, 16, torch.float32, torch.device("cpu"))
    run = torch.tensor([[token for text in texts for token in text[:-4]]])
    documents = Documents(lengths)
    model(run, documents, cache.pack(documents, [0, 1, 2]))
    hidden = model(torch.tensor([text[-4:] for text in texts]), cache=cache.extend(4))
    for row, text in enumerate(texts):
        assert torch.allclose(hidden[row], model(torch.tensor([text]))[0, -4:], atol=1e-5)


def test_the_cache_holds_shared_heads_once_and_every_position_once() -> None:
    cache = Cache(TINY, 3, 10, torch.bfloat16, torch.device("cpu"))
    assert (
        cache.keys.nbytes + cache.values.nbytes
        == 2 * TINY.n_layers * 3 * 10 * TINY.n_kv_heads * TINY.head_dim * 2
    )


def test_the_same_seed_gives_the_same_text_whatever_the_batch_and_its_order() -> None:
    model = random_model()
    texts = {tuple(a.prompt_ids): a.ids for a in together(model, PROMPTS, 20, SAMPLED, seed=5)}
    backwards = {
        tuple(a.prompt_ids): a.ids for a in together(model, PROMPTS[::-1], 20, SAMPLED, seed=5)
    }
    assert texts == backwards
    assert texts[1, 7, 9] == list(generate(model, [1, 7, 9], 20, SAMPLED, seed=5))
    assert texts != {
        tuple(a.prompt_ids): a.ids for a in together(model, PROMPTS, 20, SAMPLED, seed=6)
    }


# Beyond the context


@pytest.mark.parametrize(("alpha", "base"), [(2.0, 20221.26), (4.0, 40889.94), (8.0, 82684.62)])
def test_ntk_raises_the_rotary_base_to_the_published_values(alpha: float, base: float) -> None:
    from dataclasses import replace

    config = replace(TINY, head_dim=128)
    assert scale_rope(config, [Completion([1])], alpha).rope_theta == pytest.approx(base, abs=0.01)


@pytest.mark.parametrize(
    ("length", "alpha"), [(8192, 3.0), (12288, 5.0), (18432, 8.0), (4096, 1.0), (100, 1.0)]
)
def test_alpha_follows_from_the_length_as_in_chinese_llama_alpaca_2(
    length: int, alpha: float
) -> None:
    from dataclasses import replace

    config = replace(TINY, max_seq_len=4096)
    assert rope_alpha_for(config, Completion([1] * (length - 50), 50)) == alpha
    assert scale_rope(config, [Completion([1] * (length - 50), 50)], 0).rope_theta == pytest.approx(
        config.rope_theta * alpha ** (config.head_dim / (config.head_dim - 2))
    )


def test_a_text_beyond_the_context_is_one_of_a_model_with_the_raised_base() -> None:
    """Fixed from the first token on: reading the whole text again with that base gives the same tokens."""
    from dataclasses import replace

    model, prompt = random_model(max_seq_len=16), random_tokens(12).tolist()
    with pytest.raises(
        UserError,
        match=r"exceed the context of 16; use --max_new_tokens 4 or fewer, .*--rope_alpha auto",
    ):
        list(decode(model, [Completion(prompt, 20)], GREEDY))
    answer = Completion(prompt, 20)
    list(decode(model, [answer], GREEDY, rope_alpha=0))
    raised = random_model(max_seq_len=16, rope_theta=TINY.rope_theta * (32 / 8 - 1) ** (4 / 2))
    with torch.no_grad():
        logits = raised.logits(raised(torch.tensor([prompt + answer.ids])))[0]
    assert answer.ids == logits[11:-1].argmax(-1).tolist()
    short = Completion(prompt, 4)
    list(decode(model, [short], GREEDY, rope_alpha=0))
    assert short.ids == list(generate(model, prompt, 4, GREEDY)), (
        "within the context nothing is scale_rope"
    )
    assert replace(model.config) == model.config


def test_ntk_goes_on_top_of_position_interpolation() -> None:
    model = random_model(rope_scaling=RopeScaling("linear", 4.0))
    assert (
        scale_rope(model.config, [Completion([1])], 2.0).rope_scaling == model.config.rope_scaling
    )


def test_logits_that_are_no_numbers_are_an_error_and_not_a_text() -> None:
    model = random_model()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    for sampling in (GREEDY, SAMPLED):
        with pytest.raises(UserError, match="logits are not finite"):
            list(generate(model, [1, 2], 3, sampling))


# The forms of `linear` and `attention` that decoding uses


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 15, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("units", [True, False], ids=["16-bit units", "none"])
def test_every_form_of_the_linear_is_its_formula_rounded_once(
    rows: int, dtype: torch.dtype, bias: bool, units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is chosen by rows, dtype and processor; large weights and small ones."""
    monkeypatch.setattr(fused, "has_bf16_units", lambda: units)
    generator = torch.Generator().manual_seed(rows)
    x, weight, b = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((rows, 1, 64), (48, 64), (48,))
    )
    exact = x.double() @ weight.double().T + (b.double() if bias else 0)
    as_it_is, shuffled = nn.Linear(64, 48), nn.Linear(64, 48)
    as_it_is.weight = shuffled.weight = nn.Parameter(weight, requires_grad=False)
    monkeypatch.setattr(packed_weights, "gains", lambda weight, rows: True)
    packed_weights.pack(shuffled, rows)
    assert shuffled.weight.is_mkldnn
    assert torch.equal(shuffled.weight.to_dense(), weight)
    for linear in (as_it_is, shuffled):
        with torch.inference_mode():
            y = fused.linear(x, linear.weight, b if bias else None)
        assert (y.shape, y.dtype) == ((rows, 1, 48), dtype)
        assert (y.double() - exact).abs().max() <= max(
            torch.finfo(dtype).eps, 1e-6
        ) * exact.abs().max()


@pytest.mark.parametrize(
    ("dtype", "rows", "units", "packs"),
    [
        (torch.bfloat16, 1, True, True),
        (torch.bfloat16, 8, False, False),
        (torch.float16, 8, True, False),
        (torch.float32, 3, True, False),
        (torch.float32, 4, False, True),
    ],
)
def test_weights_are_packed_where_the_rows_and_the_processor_gain(
    dtype: torch.dtype, rows: int, units: bool, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_weights, "has_bf16_units", lambda: units)
    monkeypatch.setattr(packed_weights, "LARGE", TINY.dim**2 + 1)
    model = random_model().to(dtype)
    model.lm_head.weight = model.model.embed_tokens.weight
    layer, embedding = model.model.layers[0], model.lm_head.weight
    ops.pack(model, rows)
    assert layer.mlp.gate_proj.weight.is_mkldnn is packs
    assert layer.self_attn.q_proj.weight.is_mkldnn is (packs and dtype == torch.bfloat16)  # small
    assert model.lm_head.weight is embedding, "shared with the embedding"
    once = layer.mlp.gate_proj.weight
    ops.pack(model, rows)
    assert layer.mlp.gate_proj.weight is once


def test_packed_weights_give_the_same_texts_and_are_for_the_fused_linear_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed_weights, "LARGE", 1)
    model = random_model()
    try:
        ops.choose("reference")
        ops.pack(model, 4)
        assert not model.lm_head.weight.is_mkldnn
        ops.choose("auto")
        before = [answer.ids for answer in together(model, PROMPTS, 6, GREEDY)]
        ops.pack(model, 4)
        assert model.lm_head.weight.is_mkldnn
        assert [answer.ids for answer in together(model, PROMPTS, 6, GREEDY)] == before
        with pytest.raises(AssertionError, match="take gradients before"):
            model.lm_head(
                torch.ones(1, TINY.dim, requires_grad=True)
            )  # oneDNN's product would give none, in silence
    finally:
        ops.choose("")


@pytest.mark.parametrize("units", [True, False], ids=["16-bit units", "none"])
def test_a_16_bit_linear_is_trained_by_the_processors_own_products_where_it_has_them(
    units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "has_bf16_units", lambda: units)
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((40, 64), (48, 64), (40, 48))
    )
    y = fused.linear(x.requires_grad_(), weight.requires_grad_())
    assert ("Linear16" in y.grad_fn.name()) is not units
    y.backward(dy)
    for found, exact in (
        (x.grad, dy.double() @ weight.double()),
        (weight.grad, dy.double().T @ x.double()),
    ):
        assert (found.double() - exact).norm() <= 4e-3 * exact.norm()


def test_a_mask_that_decoding_made_serves_where_gradients_are_asked_for() -> None:
    lengths, (q, k, v) = (
        torch.tensor([3, 5]),
        (torch.randn(2, n, 4, 8, generator=torch.Generator().manual_seed(n)) for n in (2, 5, 5)),
    )
    with torch.inference_mode():
        before = fused.attention(q, k, v, None, lengths)
    after = fused.attention(q.requires_grad_(), k, v, None, lengths)
    after.sum().backward()
    assert torch.equal(after, before)


def test_a_session_packs_for_as_many_texts_as_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    packed_for = []
    monkeypatch.setattr(ops, "pack", lambda model, rows: packed_for.append(rows))
    tokenizer = open_tokenizer(Path(__file__).parent / "golden/model")
    session = Engine(random_model(), tokenizer, GenerationConfig(template="none"))
    for beams, count in ((1, 1), (1, 4), (3, 1)):
        session.config = GenerationConfig(
            template="none", greedy=True, max_new_tokens=3, num_beams=beams
        )
        list(session.stream([session.new_completion([1, 5]) for _ in range(count)], seed=0))
    assert packed_for == [1, 4, 3]


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(
    "attention", [fused.attention, reference.attention], ids=["fused", "reference"]
)
def test_attention_over_rows_of_unlike_length_is_attention_over_each(T: int, attention) -> None:
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


def test_a_checkpoint_that_stretches_its_base_itself_is_not_stretched_twice() -> None:
    model = random_model(rope_scaling=RopeScaling("dynamic", 2.0))
    with pytest.raises(UserError, match="rope_scaling, dynamic, stretches"):
        scale_rope(model.config, [Completion([1])], 2.0)
