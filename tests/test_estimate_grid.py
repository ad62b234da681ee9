"""Plans of grids: what --dry_run predicts for a rank is what the rank then holds."""

import re
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import train
from minillama import comm
from minillama.checkpoint.hf_reader import empty_model
from minillama.errors import UserError
from minillama.files import write_json
from minillama.grid import make_grid
from minillama.llama_config import PUBLISHED, LlamaConfig
from minillama.lora import add_lora
from minillama.ops import Documents
from minillama.parallel.pipeline import keep_stage
from minillama.parallel.placement import plan
from minillama.parallel.sharded_optimizer import ShardedOptimizer
from minillama.parallel.tensor import connect_ranks
from minillama.parallel.zero import CHUNK
from minillama.train_config import TrainConfig
from minillama.training.dry_run import describe, refuse_what_cannot_fit
from minillama.training.estimate import (
    Place,
    activation_bytes,
    estimate,
    parts_at,
    places_of,
    trainable_count,
    weight_bytes,
)
from minillama.training.model_building import lora_config, recompute_activations
from tests.ranks import run_on_ranks

# Five layers on two stages, and a vocabulary that two ranks do not divide.
SMALL = LlamaConfig(
    dim=96,
    n_layers=5,
    n_heads=8,
    n_kv_heads=4,
    head_dim=16,
    ffn_dim=256,
    vocab_size=16001,
    max_seq_len=256,
    norm_eps=1e-5,
    rope_theta=10000.0,
)
LORA = {
    "lora": True,
    "lora_rank": 64,
    "lora_targets": ("all",),
    "modules_to_save": ("embed_tokens", "lm_head"),
}


class Measured(NamedTuple):
    """What one rank holds."""

    place: Place
    weights: int  # bytes
    state: int  # of the optimizer, bytes
    num_vectors: int
    num_trained: int  # parameters of the whole model


def measure(llama: LlamaConfig, config: TrainConfig) -> Measured:
    with comm.start("cpu") as mesh:
        grid = make_grid(mesh, config.tensor_parallel, config.pipeline_parallel)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
        model = empty_model(llama, dtype, mesh=grid.tensor)
        if config.lora:
            add_lora(model, lora_config(config), mesh=grid.tensor)
        if grid.stage.size > 1:
            keep_stage(model, grid.stage)
        tied = {"model.embed_tokens.weight"} if llama.tie_embeddings else set()
        optimizer = ShardedOptimizer(model.named_parameters(), grid, config, tied)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        state = 0
        for vector in optimizer.vectors:
            state += vector.m.nbytes + vector.v.nbytes
            is_own_master = (
                vector.master.data_ptr() == vector.weights[vector.update_range].data_ptr()
            )
            state += 0 if is_own_master else vector.master.nbytes
        place = Place(grid.stage.rank, grid.stage.size, grid.tensor.rank, grid.tensor.size)
        num_vectors = len(optimizer.vectors)
        return Measured(place, weights, state, num_vectors, optimizer.num_trained)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("lora", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("ranks", "tensors", "stages", "zero_stage"),
    [(2, 2, 1, 0), (2, 1, 2, 0), (4, 2, 2, 0), (4, 2, 1, 1), (4, 1, 2, 2), (3, 1, 3, 0)],
)
def test_a_rank_holds_the_bytes_that_are_predicted(
    ranks: int, tensors: int, stages: int, zero_stage: int, lora: dict, tied: bool
) -> None:
    """Weights to the byte, the optimizer's state to the padding: a chunk for each vector."""
    llama = replace(SMALL, tie_embeddings=tied)
    config = TrainConfig(
        precision="bf16",
        tensor_parallel=tensors,
        pipeline_parallel=stages,
        zero_stage=zero_stage,
        **lora,
    )
    for rank in run_on_ranks(ranks, measure, llama, config):
        predicted = estimate(llama, config, ranks, rank.place)
        assert rank.weights == predicted.weights
        assert 0 <= rank.state - predicted.optimizer <= rank.num_vectors * CHUNK * 12
        assert rank.num_trained == predicted.trainable


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_device_holds_what_placement_gives_it(tied: bool) -> None:
    llama = replace(SMALL, tie_embeddings=tied)
    devices = [torch.device("cuda", number) for number in range(3)]
    places = plan(devices, llama.n_layers, tied)
    for number, place in enumerate(places_of(TrainConfig(devices="3"))):
        names = {part.name for part in parts_at(llama, None, place)}
        expected = {n for n in llama.parameter_shapes() if places.device_of(n) == devices[number]}
        assert names == expected


def test_the_stages_of_a_model_hold_all_of_it_and_a_tied_copy() -> None:
    for name in ("7b", "70b"):
        llama = PUBLISHED[name]
        places = [Place(stage, 4, tensor, 8) for stage in range(4) for tensor in range(8)]
        sizes = [prod(p.shape) for at in places for p in parts_at(llama, None, at)]
        norms = 7 * (2 * llama.n_layers + 1) * llama.dim  # on the seven other tensor ranks too
        assert sum(sizes) == llama.parameter_count() + norms


def test_a_stage_keeps_the_activations_of_the_micro_batches_on_their_way() -> None:
    """Stage s of S keeps S - s of them, or as many as there are; a device keeps one."""
    one_layer = activation_bytes(replace(SMALL, n_layers=1), 10, 4) - 10 * 4 * SMALL.dim
    four = replace(SMALL, n_layers=4)
    for stage, kept in enumerate([4, 3, 2]):
        place = Place(stage, 4)
        assert activation_bytes(four, 10, 4, place=place, micro_batches=9) == kept * one_layer
    assert activation_bytes(four, 10, 4, place=Place(0, 4), micro_batches=2) == 2 * one_layer
    device = Place(0, 4, is_device=True)
    assert activation_bytes(four, 10, 4, place=device, micro_batches=9) == one_layer


def test_tensor_ranks_share_out_heads_and_the_width_of_the_mlp() -> None:
    """By hand, one token of one layer in bf16: 4 C + (5 H D + 3 F) / 2, and H / 2 + 2 in fp32."""
    llama = replace(SMALL, n_layers=2)
    place = Place(0, 2, 0, 2)
    elements = 4 * 96 + (5 * 8 * 16 + 3 * 256) // 2
    assert activation_bytes(llama, 1, 2, place=place) == 2 * elements + 4 * (8 // 2 + 2)


def bytes_kept(recompute: bool) -> int:
    """Of the activations that one of two tensor ranks keeps for backward."""
    with comm.start("cpu") as mesh:
        line = make_grid(mesh, 2).tensor
        model = empty_model(SMALL, torch.float32, mesh=line).initialise()
        connect_ranks(model, line)
        if recompute:
            recompute_activations(model.model.layers)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, torch.Tensor] = {}  # held, so that no address is used twice

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            address = tensor.untyped_storage().data_ptr()
            if tensor.is_floating_point() and address not in own:
                kept[address] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.zeros(1, 512, dtype=torch.int64), Documents([256, 256]))
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_a_tensor_rank_keeps_the_activations_that_are_predicted_within_ten_percent() -> None:
    place = Place(0, 1, 0, 2)
    predicted = activation_bytes(SMALL, 512, 4, place=place)
    assert run_on_ranks(2, bytes_kept, False) == [pytest.approx(predicted, rel=0.1)] * 2
    one_layer = (predicted - 512 * SMALL.dim * 4) // SMALL.n_layers
    predicted = activation_bytes(SMALL, 512, 4, recompute=True, place=place) - one_layer
    assert run_on_ranks(2, bytes_kept, True) == [pytest.approx(predicted, rel=0.1)] * 2


GRID = "--config 34b_lora --dry_run --world_size 16 --tensor_parallel 8 --pipeline_parallel 2"


def planned(words: str) -> str:
    config, flags = train.parse(words.split())
    return describe(config, flags.world_size)


def test_a_plan_names_the_grid_its_layers_and_the_largest_stage() -> None:
    text = planned(GRID)
    assert "1 data × 2 stages × 8 tensor ranks; layers of each stage: 24, 24" in text
    assert "the largest is stage 0: embedding, layers 0 to 23" in text
    assert "a step      256 rows" in text  # one data rank
    config, _ = train.parse(GRID.split())
    predicted = estimate(PUBLISHED["34b"], config, 16, places_of(config)[0])
    assert f"weights {predicted.weights / 1e9:.2f} GB" in text
    assert predicted.trainable == trainable_count(PUBLISHED["34b"], lora_config(config))


@pytest.mark.parametrize("source", ["key", "flag", "file"])
def test_zero_3_is_refused_with_the_bytes_of_tensor_ranks_with_zero_2(
    source: str, tmp_path: Path
) -> None:
    """13B of LoRA on 16 chips, by hand: 2 bytes a frozen weight, 4 + 4 + 8 a trained factor."""
    words = "--config 13b_lora --dry_run --world_size 16"
    if source == "file":
        stage3 = {"stage": 3, "stage3_param_persistence_threshold": 1e4, "sub_group_size": 1e9}
        write_json(tmp_path / "ds.json", {"zero_optimization": stage3})
        words += f" --deepspeed {tmp_path / 'ds.json'}"
    words += {"key": " --zero_stage 3", "flag": " --zero3_enabled True", "file": ""}[source]
    with pytest.raises(UserError) as refusal:
        planned(words)
    text = str(refusal.value)
    assert "--zero_stage 2 --tensor_parallel 8 on 16 ranks needs" in text
    frozen = 13_015_864_320
    factors = 62_586_880
    assert f"stage 3 {(2 * frozen + 16 * factors) // 16:,}" in text
    found = int(re.search(r"needs ([\d,]+) bytes", text)[1].replace(",", ""))
    # a factor: 4 for the weight, (4 + 8) / 2 at stage 2; one of two factors is not cut
    assert 2 * frozen / 8 + 10 * factors / 8 < found < 2 * frozen / 8 + 10 * factors


def test_zero_3_of_a_model_that_is_not_known_is_refused_without_bytes() -> None:
    with pytest.raises(UserError, match="--tensor_parallel N holds 1/N of them"):
        planned("--ckpt nowhere --data a.json --zero_stage 3")


def test_a_plan_of_devices_needs_none_of_them() -> None:
    text = planned("--config 13b_lora --dry_run --devices npu:0,npu:1,npu:2")
    assert "3 devices in each process; layers of each device: 14, 13, 13" in text
    assert "the largest is device 0: embedding, layers 0 to 13" in text


def test_a_plan_without_a_number_of_ranks_is_for_one_model() -> None:
    text = planned("--config 34b_lora --dry_run --tensor_parallel 4 --pipeline_parallel 3")
    assert "1 data × 3 stages × 4 tensor ranks" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tensor_parallel 16", "n_kv_heads = 8 cannot be cut over 16 .*; use 1 or 2 or 4 or 8"),
        ("--pipeline_parallel 49", "n_layers = 48 cannot fill 49 .* use at most 48"),
        ("--tensor_parallel 8 --world_size 12", "12 ranks cannot hold .* a multiple of 8"),
    ],
)
def test_a_division_that_is_impossible_is_refused_with_what_is_possible(
    flags: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        planned(f"--config 34b_lora --dry_run {flags}")


@pytest.mark.parametrize(
    ("name", "keys", "remedy"),
    [
        ("34b", {}, "use --tensor_parallel 2 on 2 ranks or a multiple, or --devices 2"),
        ("70b", {"tensor_parallel": 2}, "use --tensor_parallel 4 on 4 ranks"),
        ("70b", {"devices": "npu:0,npu:1"}, "use --tensor_parallel 4 on 4 ranks"),
        ("70b", {"precision": "fp32"}, "use --tensor_parallel 8 on 8 ranks"),
    ],
)
def test_what_cannot_fit_is_refused_with_its_bytes_and_a_grid_that_fits(
    name: str, keys: dict, remedy: str
) -> None:
    config = TrainConfig(**{"precision": "bf16", **keys})
    llama = PUBLISHED[name]
    most = max(weight_bytes(llama, config, place) for place in places_of(config))
    with pytest.raises(UserError, match=f"{most:,} bytes .* 40.00 GB is the most; {remedy}"):
        refuse_what_cannot_fit(llama, config)


def test_a_model_of_many_heads_that_fits_only_on_stages_gets_stages() -> None:
    """Eight tensor ranks are the most that is proposed."""
    llama = replace(PUBLISHED["70b"], n_layers=240)
    with pytest.raises(
        UserError, match="use --tensor_parallel 8 --pipeline_parallel 2 on 16 ranks"
    ):
        refuse_what_cannot_fit(llama, TrainConfig(precision="bf16"))


@pytest.mark.parametrize("devices", ["4", "npu:0,npu:1,npu:2,npu:3"])
def test_a_model_that_fits_on_several_devices_is_not_refused(devices: str) -> None:
    refuse_what_cannot_fit(PUBLISHED["70b"], TrainConfig(precision="bf16", devices=devices))
