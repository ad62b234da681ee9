"""Training on tensor ranks: losses, norms and weights are those of one rank, up to rounding."""

from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch

from minillama import comm
from minillama.checkpoint.hf_reader import load_model
from minillama.checkpoint.hf_writer import save_model
from minillama.comm import Mesh
from minillama.errors import UserError
from minillama.loss_curves import read_metrics
from minillama.parallel.shards import axis_of
from minillama.tokenizer import open_tokenizer
from minillama.train_config import TrainConfig
from minillama.training.architecture import model_config
from minillama.training.run import Run, prepare
from minillama.training.trainer import Trainer, train
from tests.conftest import random_model, random_tokens
from tests.peers import assert_same_logits, open_in_transformers
from tests.ranks import run_on_ranks
from tests.runs import small_run, weights_of
from tests.tensor_ranks import EIGHT_HEADS

STEPS = 10


@pytest.fixture(scope="module")
def bases(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models with the inputs' vocabulary, of which no number of ranks divides it."""
    folder = tmp_path_factory.mktemp("bases")
    tokenizer = open_tokenizer(inputs / "tokenizer.model")
    size = {**EIGHT_HEADS, "vocab_size": tokenizer.size + 3, "max_seq_len": 128}
    save_model(random_model(**size), folder / "untied", tokenizer)
    save_model(random_model(**size, tie_embeddings=True), folder / "tied", tokenizer)
    biases = {"attention_bias": True, "mlp_bias": True}
    save_model(random_model(**size, **biases), folder / "biases", tokenizer)
    size["vocab_size"] = tokenizer.size - 5
    save_model(random_model(**size), folder / "small vocabulary", tokenizer)
    return folder


@pytest.fixture
def settings(inputs: Path, bases: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Ten steps of four micro-batches; the name of its directory, and changes of its settings."""

    def make(name: str, **changes) -> TrainConfig:
        standard = {
            "ckpt": str(bases / "untied"),
            "max_steps": STEPS,
            "gradient_accumulation_steps": 4,
            "learning_rate": 1e-3,
            "validation_split": 0.1,
        }
        return small_run(inputs, tmp_path / name, **standard | changes)

    return make


def train_on_rank(config: TrainConfig) -> str:
    """Returns what is printed."""
    with comm.start("cpu", timeout_minutes=1) as mesh, redirect_stdout(StringIO()) as printed:
        train(config, mesh)
        return printed.getvalue()


def train_on_grid(config: TrainConfig, data: int, tensor: int) -> list[str]:
    """Train on data × tensor ranks with the global batch of one; returns what each prints."""
    accumulation = config.gradient_accumulation_steps // data
    config = replace(config, tensor_parallel=tensor, gradient_accumulation_steps=accumulation)
    return run_on_ranks(data * tensor, train_on_rank, config)


def final_weights(config: TrainConfig) -> bytes:
    (file,) = (Path(config.out_dir) / "final").glob("*.safetensors")
    return file.read_bytes()


def curve_of(config: TrainConfig, key: str) -> list[float]:
    records = read_metrics(Path(config.out_dir) / "metrics.jsonl")
    return [record[key] for record in records if key in record]


def assert_same_run(found: TrainConfig, expected: TrainConfig, weights: float) -> None:
    """Compare losses, norms and final weights. weights: the largest difference allowed."""
    for key, tolerance in (("loss", 1e-6), ("grad_norm", 2e-6), ("eval_loss", 1e-6)):
        losses = curve_of(found, key)
        assert losses == pytest.approx(curve_of(expected, key), rel=tolerance), key
        assert losses
    whole = weights_of(Path(expected.out_dir) / "final")
    joined = weights_of(Path(found.out_dir) / "final")
    assert list(joined) == list(whole)
    for name, tensor in whole.items():
        difference = (joined[name] - tensor).abs().max()
        assert difference <= weights, f"{name}: {difference:g}"


@pytest.mark.parametrize(
    ("data", "tensor", "zero_stage"),
    [(1, 2, 0), (1, 4, 0), (2, 2, 1), (2, 2, 2), (4, 2, 2)],
    ids=["TP2", "TP4", "DP2 x TP2, ZeRO-1", "DP2 x TP2, ZeRO-2", "DP4 x TP2, ZeRO-2"],
)
def test_a_grid_trains_as_one_rank_does(
    data: int, tensor: int, zero_stage: int, settings: Callable[..., TrainConfig]
) -> None:
    one = settings("one")
    train(one, Mesh())
    grid = settings("grid", zero_stage=zero_stage)
    train_on_grid(grid, data, tensor)
    assert_same_run(grid, one, weights=2e-5)


LORA = {"lora": True, "lora_targets": ("all", "lm_head"), "lora_rank": 2}
VARIANTS = {
    "tied": {"ckpt": "tied"},
    "biases": {"ckpt": "biases"},
    "grown vocabulary": {"ckpt": "small vocabulary", "grow_vocabulary": True},
    "LoRA": LORA,
    "LoRA with dropout": {**LORA, "lora_dropout": 0.2},
    "LoRA and whole modules": {
        "lora": True,
        "lora_targets": ("all",),
        "modules_to_save": ("embed_tokens", "lm_head"),
    },
    "recomputation": {**LORA, "lora_dropout": 0.2, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_two_ranks_train_every_kind_of_model_as_one_does(
    changes: dict, settings: Callable[..., TrainConfig], bases: Path
) -> None:
    changes = {**changes, "ckpt": str(bases / changes.get("ckpt", "untied"))}
    one = settings("one", **changes)
    train(one, Mesh())
    two = settings("two", **changes)
    train_on_grid(two, data=1, tensor=2)
    assert_same_run(two, one, weights=2e-5)


def adapter_on_rank(config: TrainConfig) -> dict[str, bytes]:
    """Train on this rank; returns the parameters of which every rank has the whole."""
    with comm.start("cpu", timeout_minutes=1) as mesh:
        run = prepare(config, mesh)
        assert isinstance(run, Run)
        trainer = Trainer(run)
        for step in range(3):
            trainer.update(run.train_batches.micro_batches(step), rate=1e-2)
        whole = {}
        for name, parameter in run.model.named_parameters():
            if axis_of(name) is None:
                whole[name] = parameter.detach().numpy().tobytes()
        return whole


def test_what_all_ranks_hold_stays_the_same_on_all(settings: Callable[..., TrainConfig]) -> None:
    """LoRA's uncut factors too: each rank computes a part of their gradient."""
    for changes in (LORA, {}):
        config = settings("run", **changes, zero_stage=1, tensor_parallel=2)
        first, *others = run_on_ranks(4, adapter_on_rank, config)
        assert first
        assert others == [first] * 3


def test_an_adapter_is_trained_further_on_another_number_of_ranks(
    settings: Callable[..., TrainConfig],
) -> None:
    begun = settings("begun", **LORA, max_steps=2)
    train_on_grid(begun, data=1, tensor=4)
    adapter = str(Path(begun.out_dir) / "final")
    one = settings("one", **LORA, adapter=adapter)
    train(one, Mesh())
    two = settings("two", **LORA, adapter=adapter)
    train_on_grid(two, data=1, tensor=2)
    assert_same_run(two, one, weights=2e-5)


def test_bf16_trains_as_one_rank_does_up_to_its_rounding(
    settings: Callable[..., TrainConfig],
) -> None:
    one = settings("one", precision="bf16")
    train(one, Mesh())
    two = settings("two", precision="bf16")
    train_on_grid(two, data=1, tensor=2)
    assert curve_of(two, "loss") == pytest.approx(curve_of(one, "loss"), rel=2e-3)


def test_recomputation_on_ranks_changes_no_bit(settings: Callable[..., TrainConfig]) -> None:
    changes = {**LORA, "lora_dropout": 0.2, "max_steps": 3}
    kept = settings("kept", **changes)
    recomputed = settings("recomputed", **changes, gradient_checkpointing=True)
    for config in (kept, recomputed):
        train_on_grid(config, data=1, tensor=2)
    for key in ("loss", "grad_norm"):
        assert curve_of(kept, key) == curve_of(recomputed, key)
    assert final_weights(kept) == final_weights(recomputed)


def test_a_model_from_scratch_starts_with_the_same_weights_on_any_grid(
    inputs: Path, settings: Callable[..., TrainConfig]
) -> None:
    scratch = {
        "init": "scratch",
        "ckpt": "",
        "tokenizer": str(inputs / "tokenizer.model"),
        "max_steps": 2,
        "learning_rate": 0.0,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 8,
        "n_kv_heads": 4,
        "ffn_dim": 48,
        "context": 128,
    }
    one = settings("one", **scratch)
    train(one, Mesh())
    four = settings("four", **scratch)
    train_on_grid(four, data=1, tensor=4)
    assert final_weights(four) == final_weights(one)


def test_transformers_opens_what_ranks_have_trained(settings: Callable[..., TrainConfig]) -> None:
    config = settings("run", max_steps=2)
    printed, nothing = train_on_grid(config, data=1, tensor=2)
    final = Path(config.out_dir) / "final"
    tokens = random_tokens(2, 12, vocab_size=300)
    ours = load_model(final)
    assert f"model: {ours.config.parameter_count():,} parameters" in printed
    assert nothing == ""
    theirs = open_in_transformers(final)
    with torch.no_grad():
        assert_same_logits(ours.logits(ours(tokens)), theirs(tokens).logits)


def test_heads_that_the_ranks_cannot_divide_are_refused(
    settings: Callable[..., TrainConfig],
) -> None:
    config = settings("run", tensor_parallel=8)
    with pytest.raises(UserError, match=r"n_kv_heads = 4 cannot be cut over 8 .*; use 1 or 2 or 4"):
        model_config(config, Path(config.ckpt))


def train_and_catch(config: TrainConfig) -> str:
    with pytest.raises(UserError) as caught:
        train_on_rank(config)
    return str(caught.value)


def test_all_ranks_refuse_a_weight_that_only_one_of_them_read(
    bases: Path, tmp_path: Path, settings: Callable[..., TrainConfig]
) -> None:
    model = load_model(bases / "untied")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, -1] = torch.nan  # a column of rank 1
    tokenizer = open_tokenizer(bases / "untied")
    save_model(model, tmp_path / "broken", tokenizer)
    config = settings("run", ckpt=str(tmp_path / "broken"), tensor_parallel=2)
    for message in run_on_ranks(2, train_and_catch, config):
        assert "model.layers.1.mlp.down_proj.weight holds NaN" in message
