"""Training on pipeline stages ends at the bytes of one rank, whatever the grid."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillama import comm
from minillama.checkpoint.hf_writer import save_model
from minillama.errors import UserError
from minillama.loss_curves import read_metrics
from minillama.tokenizer import open_tokenizer
from minillama.train_config import TrainConfig
from minillama.training.summary import Stopped, Summary
from minillama.training.trainer import Trainer, train
from tests.conftest import random_model
from tests.ranks import run_on_ranks
from tests.runs import small_run, weights_of
from tests.tensor_ranks import EIGHT_HEADS

Settings = Callable[..., TrainConfig]
STEPS = 6
MICRO_BATCHES = 4


@pytest.fixture(scope="module")
def bases(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models of five layers with the inputs' vocabulary: one tied, one not."""
    folder = tmp_path_factory.mktemp("bases")
    tokenizer = open_tokenizer(inputs / "tokenizer.model")
    shape = {**EIGHT_HEADS, "n_layers": 5, "vocab_size": tokenizer.size, "max_seq_len": 128}
    save_model(random_model(**shape), folder / "untied", tokenizer)
    save_model(random_model(**shape, tie_embeddings=True), folder / "tied", tokenizer)
    return folder


@pytest.fixture
def settings(inputs: Path, bases: Path, tmp_path: Path) -> Settings:
    """Six steps of four micro-batches; the name of its directory, and changes of its settings."""

    def make(name: str, base: str = "untied", **changes) -> TrainConfig:
        standard = {
            "ckpt": str(bases / base),
            "max_steps": STEPS,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "validation_split": 0.1,
            "reduction": "exact",
            "max_grad_norm": 0.5,
        }
        return small_run(inputs, tmp_path / name, **standard | changes)

    return make


def train_on_rank(config: TrainConfig) -> Summary | Stopped | str:
    torch.set_num_threads(1)
    with comm.start("cpu", timeout_minutes=1) as mesh:
        try:
            return train(config, mesh)
        except UserError as error:
            return str(error)


def train_on_grid(
    config: TrainConfig, data: int = 1, stages: int = 1, tensor: int = 1
) -> list[Summary]:
    """Train with the global batch of one rank; returns the summary of each rank."""
    accumulation = config.gradient_accumulation_steps // data
    config = replace(config, gradient_accumulation_steps=accumulation)
    config = replace(config, tensor_parallel=tensor, pipeline_parallel=stages)
    return run_on_ranks(data * stages * tensor, train_on_rank, config)


def weights_hash(config: TrainConfig) -> str:
    (file,) = (Path(config.out_dir) / "final").glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def curve_of(config: TrainConfig, key: str) -> list[float]:
    records = read_metrics(Path(config.out_dir) / "metrics.jsonl")
    return [record[key] for record in records if key in record]


def assert_same_run(found: TrainConfig, expected: TrainConfig) -> None:
    """Losses, norms and weights are equal to the bit."""
    for key in ("loss", "grad_norm", "eval_loss", "tokens"):
        curve = curve_of(found, key)
        assert curve == curve_of(expected, key), key
        assert curve
    assert weights_hash(found) == weights_hash(expected)


GRIDS = [(1, 2, 0), (1, 4, 0), (2, 2, 1), (2, 2, 2), (4, 2, 2)]


@pytest.mark.parametrize(("data", "stages", "zero_stage"), GRIDS)
def test_a_grid_ends_at_the_bytes_of_one_rank(
    data: int, stages: int, zero_stage: int, settings: Settings
) -> None:
    one = settings("one")
    (expected,) = train_on_grid(one)
    grid = settings("grid", zero_stage=zero_stage)
    summaries = train_on_grid(grid, data, stages)
    assert_same_run(grid, one)
    for key in ("train_loss", "last_loss", "eval_loss", "trainable_parameters", "tokens"):
        assert {summary[key] for summary in summaries} == {expected[key]}, key


LORA = {"lora": True, "lora_rank": 2}
WITH_DROPOUT = {**LORA, "lora_targets": ("all", "lm_head"), "lora_dropout": 0.2}
RECOMPUTED = {**WITH_DROPOUT, "gradient_checkpointing": True}
WHOLE_MODULES = {**LORA, "modules_to_save": ("embed_tokens", "lm_head")}
LAST_STAGE_ALONE = {**LORA, "lora_targets": ("layers.4.mlp.up_proj",)}
BF16 = {"precision": "bf16"}
UNPACKED = {"packing": False}


KINDS = [RECOMPUTED, WHOLE_MODULES, LAST_STAGE_ALONE, BF16, UNPACKED]


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_every_kind_of_training_ends_at_the_bytes_of_one_rank(
    changes: dict, settings: Settings
) -> None:
    one = settings("one", **changes)
    train_on_grid(one)
    grid = settings("grid", **changes, zero_stage=2)
    train_on_grid(grid, data=2, stages=2)
    assert_same_run(grid, one)


@pytest.mark.parametrize("rest", [1, 2, 3])
def test_a_step_may_have_fewer_micro_batches_than_stages_or_none_for_a_data_rank(
    rest: int, inputs: Path, tmp_path: Path, settings: Settings
) -> None:
    """An epoch is a step of four micro-batches and one of `rest`, for two data ranks."""
    records = json.loads((inputs / "alpaca.json").read_text())
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records[: MICRO_BATCHES + rest]))
    changes = {
        "data": (str(data),),
        "packing": False,
        "per_device_train_batch_size": 1,
        "max_steps": 4,
        "validation_split": 0.0,
        "eval_data": (str(data),),
    }
    one = settings("one", **changes)
    train_on_grid(one)
    grid = settings("grid", **changes)
    train_on_grid(grid, data=2, stages=4)
    assert_same_run(grid, one)


@pytest.mark.parametrize(("data", "stages"), [(1, 2), (1, 3), (2, 3)])
def test_a_tied_model_trains_as_on_one_rank_up_to_rounding(
    data: int, stages: int, settings: Settings
) -> None:
    """Both ends add their parts of the gradient in another order than one rank does.

    A loss is near 6, where fp32 numbers are 8e-8 of it apart.
    """
    one = settings("one", "tied", zero_stage=1)
    train_on_grid(one)
    grid = settings("grid", "tied", zero_stage=1)
    train_on_grid(grid, data, stages)
    for key, tolerance in (("loss", 1e-7), ("grad_norm", 5e-7), ("eval_loss", 1e-7)):
        assert curve_of(grid, key) == pytest.approx(curve_of(one, key), rel=tolerance), key
    expected = weights_of(Path(one.out_dir) / "final")
    found = weights_of(Path(grid.out_dir) / "final")
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < 1e-5, name


def copies_of_the_embedding(config: TrainConfig) -> str:
    """Train; returns a hash of this rank's embedding, "" on a stage without one."""
    trainers = []
    original = Trainer.__init__

    def noted(self: Trainer, *arguments) -> None:
        trainers.append(self)
        original(self, *arguments)

    Trainer.__init__ = noted
    train_on_rank(config)
    named = dict(trainers[0].model.named_parameters())
    embedding = named.get("model.embed_tokens.weight")
    if embedding is None:
        return ""
    return hashlib.sha256(embedding.detach().numpy().tobytes()).hexdigest()


def test_the_two_copies_of_a_tied_embedding_stay_equal(
    settings: Settings,
) -> None:
    config = settings("run", "tied", pipeline_parallel=3, max_steps=3)
    first, middle, last = run_on_ranks(3, copies_of_the_embedding, config)
    assert first == last
    assert middle == ""


def test_tensor_ranks_of_stages_train_as_one_rank_up_to_rounding(
    settings: Settings,
) -> None:
    one = settings("one", **WITH_DROPOUT)
    train_on_grid(one)
    grid = settings("grid", **WITH_DROPOUT)
    train_on_grid(grid, stages=2, tensor=2)
    for key, tolerance in (("loss", 1e-6), ("grad_norm", 2e-6), ("eval_loss", 1e-6)):
        assert curve_of(grid, key) == pytest.approx(curve_of(one, key), rel=tolerance), key


SCRATCH = {
    "init": "scratch",
    "ckpt": "",
    "dim": 32,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "ffn_dim": 48,
    "context": 128,
}


def test_a_model_from_scratch_does_not_depend_on_the_grid(inputs: Path, settings: Settings) -> None:
    changes = {**SCRATCH, "tokenizer": str(inputs / "tokenizer.model"), "max_steps": 2}
    one = settings("one", **changes)
    train_on_grid(one)
    grid = settings("grid", **changes)
    train_on_grid(grid, stages=3)
    assert_same_run(grid, one)
