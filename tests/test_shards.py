"""The table of axes: every parameter has one, and its parts make the whole again."""

import pytest
import torch

from minillama.errors import UserError
from minillama.lora import add_lora
from minillama.parallel.shards import (
    COLUMNS,
    ROWS,
    axis_of,
    check_tensor_parallel,
    cut,
    held,
    join,
    layers_of_stage,
    part_of,
)
from minillama.peft_config import LoraConfig
from tests.conftest import random_model

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def every_parameter() -> dict[str, torch.Tensor]:
    """The parameters of a model with biases and with LoRA on every linear layer."""
    model = random_model(attention_bias=True, mlp_bias=True, vocab_size=53)
    parameters = dict(model.named_parameters())
    add_lora(model, LoraConfig(rank=2, targets=(*LINEARS, "lm_head")))
    return parameters | dict(model.named_parameters())


def test_the_parts_of_every_parameter_make_the_whole_again() -> None:
    """Sizes that do not divide an axis too: the rest belongs to the last rank."""
    for name, whole in every_parameter().items():
        axis = axis_of(name)
        for size in range(1, 9):
            parts = [cut(whole, axis, rank, size) for rank in range(size)]
            assert torch.equal(join(parts, axis), whole), (name, size)


def test_the_parts_of_a_layer_compute_what_the_whole_computes() -> None:
    """W x is the parts' results side by side if rows are cut, and their sum if columns are."""
    x = torch.randn(6, dtype=torch.float64)
    weight = torch.randn(8, 6, dtype=torch.float64)
    rows = [cut(weight, ROWS, rank, 2) @ x for rank in range(2)]
    assert torch.allclose(torch.cat(rows), weight @ x)
    columns = [cut(weight, COLUMNS, rank, 2) @ cut(x, 0, rank, 2) for rank in range(2)]
    assert torch.allclose(columns[0] + columns[1], weight @ x)


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("model.layers.3.self_attn.q_proj.weight", ROWS),
        ("model.layers.3.self_attn.q_proj.bias", ROWS),
        ("model.layers.3.self_attn.q_proj.lora_A", None),
        ("model.layers.3.self_attn.q_proj.lora_B.default.weight", ROWS),
        ("model.layers.3.mlp.down_proj.weight", COLUMNS),
        ("model.layers.3.mlp.down_proj.bias", None),
        ("model.layers.3.mlp.down_proj.lora_A", COLUMNS),
        ("model.layers.3.mlp.down_proj.lora_B", None),
        ("model.embed_tokens.weight", ROWS),
        ("model.embed_tokens.lora_embedding_A", COLUMNS),
        ("model.embed_tokens.lora_embedding_B", None),
        ("model.layers.3.input_layernorm.weight", None),
        ("model.norm.weight", None),
        ("lm_head.weight", ROWS),
    ],
)
def test_axes_by_hand(name: str, axis: int | None) -> None:
    assert axis_of(name) == axis


def test_a_name_that_is_not_in_the_table_has_no_axis() -> None:
    with pytest.raises(KeyError, match="router"):
        axis_of("model.layers.0.mlp.router.weight")


def test_the_rest_of_a_vocabulary_is_the_last_ranks() -> None:
    parts = [part_of(10, rank, 4) for rank in range(4)]
    assert parts == [range(0, 2), range(2, 4), range(4, 6), range(6, 10)]


def test_stages_hold_runs_of_layers_that_differ_by_at_most_one() -> None:
    assert [layers_of_stage(7, 3, stage) for stage in range(3)] == [
        range(0, 3),
        range(3, 5),
        range(5, 7),
    ]
    with pytest.raises(UserError, match="n_layers = 2 cannot fill 3 pipeline stages; use at most"):
        layers_of_stage(2, 3, 0)


def test_sizes_that_the_ranks_do_not_divide_are_refused_with_the_largest_that_do() -> None:
    sizes = {"n_heads": 32, "n_kv_heads": 4, "ffn_dim": 96}
    check_tensor_parallel(sizes, 4)
    with pytest.raises(UserError, match=r"n_kv_heads = 4 cannot be cut over 8 .*; use 1 or 2 or 4"):
        check_tensor_parallel(sizes, 8)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "cut"),
        ("model.layers.3.self_attn.q_proj.lora_A", "partial"),
        ("model.layers.3.self_attn.q_proj.lora_B", "cut"),
        ("model.layers.3.mlp.down_proj.lora_A", "cut"),
        ("model.layers.3.mlp.down_proj.lora_B", "partial"),
        ("model.layers.3.mlp.down_proj.bias", "whole"),
        ("model.embed_tokens.lora_embedding_A", "cut"),
        ("model.embed_tokens.lora_embedding_B", "partial"),
        ("model.norm.weight", "whole"),
        ("lm_head.weight", "cut"),
    ],
)
def test_the_factor_that_is_not_cut_has_a_partial_gradient(name: str, expected: str) -> None:
    assert held(name) == expected
