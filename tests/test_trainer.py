"""The training loop: the losses of transformers and torch, any split of a batch, and a resume that cannot be told."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minillama import comm
from minillama.checkpoint.hf_format import load_model, save_model
from minillama.comm import Mesh
from minillama.compat import deepspeed
from minillama.data import demo
from minillama.data.windows import Batch
from minillama.errors import UserError
from minillama.hf_config import published
from minillama.lora import load_adapter
from minillama.loss_curves import read_metrics, smoothed
from minillama.ops import IGNORE
from minillama.parallel.sharded_optimizer import ShardedOptimizer
from minillama.tensor_files import read_safetensors
from minillama.tokenizer import open_tokenizer, train_tokenizer
from minillama.train_config import TrainConfig
from minillama.training import run, trainer
from minillama.training.dry_run import training_flops
from minillama.training.run import recompute_activations
from tests.conftest import random_model, random_tokens
from tests.peers import assert_same_logits, open_in_peft, open_in_transformers
from tests.ranks import run_on_ranks

MESH = Mesh()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an instruction file, a vocabulary, and a random LLaMA that fits it."""
    folder = tmp_path_factory.mktemp("inputs")
    records = demo.records(("first", "repeat", "larger"), 300, seed=0, held_out=False)
    (folder / "alpaca.json").write_text(json.dumps(records))
    (folder / "text.txt").write_text(" ".join(record["instruction"] for record in records))
    (folder / "tokenizer.model").write_bytes(
        train_tokenizer([r["instruction"] + r["output"] for r in records], 320)
    )
    tokenizer = open_tokenizer(folder / "tokenizer.model")
    save_model(random_model(vocab_size=tokenizer.size, max_seq_len=128), folder / "base", tokenizer)
    return folder


@pytest.fixture
def settings_for(inputs: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Settings of a small run in a folder of its own; keywords change them."""

    def make(**changes) -> TrainConfig:
        standard = {
            "ckpt": str(inputs / "base"),
            "data": (str(inputs / "alpaca.json"),),
            "template": "llama_factory_default",
            "max_length": 96,
            "per_device_train_batch_size": 2,
            "max_steps": 6,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "cache_dir": str(inputs / "cache"),
            "out_dir": str(tmp_path / "run"),
            "save_strategy": "no",
            "device": "cpu",
        }
        return TrainConfig(**standard | changes)

    return make


def losses_of(out_dir: Path | str) -> list[float]:
    return [
        record["loss"]
        for record in read_metrics(Path(out_dir) / "metrics.jsonl")
        if "loss" in record
    ]


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    file = next(directory.glob("*model.safetensors"))
    return {name: entry.read() for name, entry in read_safetensors(file).items()}


# The learning rate


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("linear", "get_linear_schedule_with_warmup"),
        ("cosine", "get_cosine_schedule_with_warmup"),
        ("constant", "get_constant_schedule"),
        ("constant_with_warmup", "get_constant_schedule_with_warmup"),
    ],
)
@pytest.mark.parametrize("warmup", [{"warmup_ratio": 0.03}, {"warmup_steps": 7}, {}], ids=str)
def test_the_learning_rate_is_transformers(kind: str, function: str, warmup: dict) -> None:
    transformers = pytest.importorskip("transformers")
    settings, total = TrainConfig(lr_scheduler_type=kind, learning_rate=2e-5, **warmup), 103
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
    steps = (
        {"num_warmup_steps": settings.warmup_steps or math.ceil(total * settings.warmup_ratio)}
        if kind != "constant"
        else {}
    )
    steps |= {"num_training_steps": total} if kind in ("linear", "cosine") else {}
    schedule = getattr(transformers, function)(optimizer, **steps)
    for step in range(total):
        assert trainer.learning_rate(step, total, settings) == pytest.approx(
            schedule.get_last_lr()[0], rel=1e-12, abs=1e-20
        )
        optimizer.step()
        schedule.step()


def test_warmup_is_rounded_up_and_the_first_update_is_at_zero() -> None:
    """ceil(100 x 0.021) = 3 updates at 0, 1/3 and 2/3 of the peak, then the peak."""
    settings = TrainConfig(learning_rate=3.0, warmup_ratio=0.021, lr_scheduler_type="cosine")
    assert [trainer.learning_rate(step, 100, settings) for step in range(4)] == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedules_end_at_min_learning_rate(kind: str) -> None:
    settings = TrainConfig(learning_rate=1.0, min_learning_rate=0.1, lr_scheduler_type=kind)
    rates = [trainer.learning_rate(step, 10, settings) for step in range(11)]
    assert rates[0] == 1.0
    assert rates[10] == pytest.approx(0.1)
    assert rates == sorted(rates, reverse=True)


# The optimizer


def flat_adamw(model: torch.nn.Module, weight_decay: float = 0.1) -> ShardedOptimizer:
    return ShardedOptimizer(
        model.named_parameters(),
        MESH,
        TrainConfig(adam_beta2=0.95, weight_decay=weight_decay, gradient_accumulation_steps=2),
    )


def flat_weights(optimizer: ShardedOptimizer) -> torch.Tensor:
    return optimizer.vectors[0].master[: optimizer.num_trained]


def flat_gradient(optimizer: ShardedOptimizer) -> torch.Tensor:
    return optimizer.vectors[0].gradients.reduced()[: optimizer.num_trained]


def torch_adamw(model: torch.nn.Module, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """As transformers' Trainer groups them: matrices decay, norms and biases do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)


def loss_of(model: torch.nn.Module, step: int) -> torch.Tensor:
    tokens = random_tokens(2, 16, seed=step)
    return model.loss_sum(tokens, tokens.roll(-1, 1)) / 32


def test_the_flat_optimizer_is_torchs_with_clipping_and_decay_on_matrices_only() -> None:
    ours, theirs = (random_model(attention_bias=True, mlp_bias=True) for _ in range(2))
    flat, adamw = flat_adamw(ours), torch_adamw(theirs)
    for step in range(8):
        rate, max_norm = 1e-2 / (1 + step), (0.5, 1e9)[step % 2]  # clipped, and not
        flat.zero_grad()
        flat.backward(loss_of(ours, step), 1)
        norm, _ = flat.step(rate, max_norm)
        adamw.zero_grad()
        loss_of(theirs, step).backward()
        assert norm == pytest.approx(
            float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)), rel=1e-5
        )
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter, theirs.get_parameter(name), rtol=1e-4, atol=1e-5), name


def test_norms_and_biases_never_decay() -> None:
    """With no gradient, an update is the decay alone."""
    model = random_model(attention_bias=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flat_adamw(model, weight_decay=0.5).step(0.1, max_norm=0.0)
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] * (0.95 if p.ndim > 1 else 1.0)), name


def test_16_bit_weights_have_fp32_masters_that_remember_small_updates() -> None:
    """bf16 has steps of 2^-8 near 1: an update of 0.001 rounds away each time, ten of them do not."""
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    torch.nn.init.ones_(model.weight)
    flat, seen = flat_adamw(model, weight_decay=0.0), []
    for _ in range(10):
        flat.zero_grad()
        flat.backward(model(torch.ones(1, 1, dtype=torch.bfloat16)).sum(), 1)
        flat.step(0.001, max_norm=0.0)
        seen.append(model.weight.item())
    assert seen[0] == 1.0
    assert seen[-1] == 0.98828125  # 1 - 10 x 0.001, to the nearest bf16
    assert flat_weights(flat).item() == pytest.approx(0.99, abs=1e-6)


def test_16_bit_training_follows_a_float32_copy_of_its_masters() -> None:
    """GradientReducer taken at the rounded weights, updates made in fp32: torch's AdamW on fp32 copies does the same."""
    ours = random_model().bfloat16()
    flat = flat_adamw(ours)
    masters = [p.detach().float().clone().requires_grad_() for _, p in flat.vectors[0].named]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in masters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in masters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    for step in range(5):
        flat.zero_grad()
        flat.backward(loss_of(ours, step), 1)
        for master, grad in zip(masters, flat.vectors[0].views(flat_gradient(flat)), strict=True):
            master.grad = grad.clone()
        flat.step(1e-2, max_norm=0.0)
        adamw.step()
    assert torch.allclose(
        flat_weights(flat), torch.cat([m.detach().flatten() for m in masters]), rtol=1e-5, atol=1e-6
    )
    views = flat.vectors[0].views(flat_weights(flat))
    assert all(
        torch.equal(p, m.to(torch.bfloat16))
        for (_, p), m in zip(flat.vectors[0].named, views, strict=True)
    )


def test_16_bit_gradients_add_up_in_fp32() -> None:
    """bf16 cannot hold 1 + 2^-9; the sum over micro-batches can."""
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    flat = flat_adamw(model)
    for x in (1.0, 2.0**-9):
        flat.backward(model(torch.tensor([[x]], dtype=torch.bfloat16)).sum(), 1)
    assert flat_gradient(flat).item() == 1.0 + 2.0**-9


def test_frozen_parameters_are_no_part_of_the_flat_vector() -> None:
    model = random_model()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert flat_adamw(model).num_trained == model.lm_head.weight.numel()


# One global batch


@pytest.mark.parametrize(
    "split", [(1, 8), (2, 4), (4, 2), (8, 1)], ids=lambda s: f"{s[1]} micro-batches of {s[0]}"
)
def test_any_split_of_a_global_batch_gives_the_same_gradient(
    split: tuple[int, int], settings_for: Callable
) -> None:
    """Rows hold different numbers of targets; a mean of the micro-batches' means would not pass."""

    def gradient(micro: int, accumulation: int) -> torch.Tensor:
        run = trainer.Trainer(
            settings_for(
                per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation
            ),
            MESH,
        )
        batches = run.plan.micro_batches(0)
        assert len(batches) == accumulation
        run.update(batches, rate=0.0)
        return flat_gradient(run.optimizer)

    whole, parts = gradient(8, 1), gradient(*split)
    assert (whole - parts).abs().max() <= 1e-5 * whole.abs().max()


def test_recomputing_activations_gives_the_same_gradients_to_the_bit() -> None:
    plain, recomputed = random_model(), random_model()
    recompute_activations(recomputed.model.layers)
    for model in (plain, recomputed):
        loss_of(model, 0).backward()
    assert all(
        torch.equal(p.grad, recomputed.get_parameter(name).grad)
        for name, p in plain.named_parameters()
    )


def test_recomputing_runs_each_layer_twice_and_keeps_the_names_of_its_parameters() -> None:
    model, runs = random_model(), []
    names = [name for name, _ in model.named_parameters()]
    recompute_activations(model.model.layers)
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    loss_of(model, 0).backward()
    assert len(runs) == 2 * len(model.model.layers)
    assert [name for name, _ in model.named_parameters()] == names


def test_recomputation_with_dropout_draws_the_same_again(settings_for: Callable) -> None:
    gradients = []
    for recompute in (False, True):
        run = trainer.Trainer(
            settings_for(lora=True, lora_dropout=0.3, gradient_checkpointing=recompute), MESH
        )
        torch.nn.init.normal_(
            run.model.model.layers[0].self_attn.q_proj.lora_B,
            generator=torch.Generator().manual_seed(0),
        )
        run.update(run.plan.micro_batches(0), rate=0.0)
        gradients.append(flat_gradient(run.optimizer))
    assert torch.equal(*gradients)


# The loss curve


def padded(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The documents of a packed batch as rows of their own: ids, attention mask, labels (as ours: of the next token)."""

    def rows(run: torch.Tensor, fill: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            run.split(batch.lengths), batch_first=True, padding_value=fill
        )

    tokens = torch.from_numpy(batch.tokens)
    return (
        rows(tokens, 0),
        rows(torch.ones_like(tokens), 0),
        rows(torch.from_numpy(batch.labels), IGNORE),
    )


def their_losses(model: torch.nn.Module, run: trainer.Trainer, steps: int) -> list[float]:
    """The same batches through transformers' (or peft's) model, torch's AdamW and transformers' schedule."""
    transformers = pytest.importorskip("transformers")
    optimizer, losses = torch_adamw(model.train()), []
    for group in optimizer.param_groups:
        group["lr"] = run.settings.learning_rate
    schedule = transformers.get_cosine_schedule_with_warmup(
        optimizer, math.ceil(steps * run.settings.warmup_ratio), steps
    )
    for step in range(steps):
        batches = run.plan.micro_batches(step)
        targets, total = sum(batch.targets for batch in batches), 0.0
        optimizer.zero_grad()
        for batch in batches:
            tokens, attended, labels = padded(batch)
            logits = model(input_ids=tokens, attention_mask=attended).logits
            loss = (
                F.cross_entropy(
                    logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
                )
                / targets
            )
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(
            [p for p in model.parameters() if p.requires_grad], run.settings.max_grad_norm
        )
        optimizer.step()
        schedule.step()
        losses.append(total)
    return losses


CURVE = {
    "max_steps": 50,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
}


def test_the_loss_curve_is_that_of_transformers_and_torch(
    settings_for: Callable, inputs: Path
) -> None:
    settings = settings_for(**CURVE)
    trainer.train(settings, MESH)
    theirs = their_losses(
        open_in_transformers(inputs / "base"), trainer.Trainer(settings, MESH), 50
    )
    ours = losses_of(settings.out_dir)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < 0.8 * ours[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_rank": 4, "lora_targets": ("q_proj", "down_proj")},
        {"use_rslora": True, "modules_to_save": ("lm_head",)},
    ],
    ids=["two targets", "rsLoRA and a head trained whole"],
)
def test_the_loss_curve_of_lora_is_that_of_peft(
    changes: dict, settings_for: Callable, inputs: Path, tmp_path: Path
) -> None:
    settings = settings_for(**CURVE | {"learning_rate": 1e-2, "lora": True} | changes)
    run = trainer.Trainer(settings, MESH)
    run.save_model(tmp_path / "first")  # the random A that both start from
    theirs = their_losses(
        open_in_peft(inputs / "base", tmp_path / "first", trainable=True), run, 50
    )
    trainer.train(settings, MESH)
    assert losses_of(settings.out_dir) == pytest.approx(theirs, rel=1e-4)


# A run and its directory


class Stop(Exception):
    """The lights go out."""


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    update = trainer.Trainer.update

    def until(self: trainer.Trainer, *arguments) -> tuple[float, float]:
        if self.step == step:
            raise Stop
        return update(self, *arguments)

    monkeypatch.setattr(trainer.Trainer, "update", until)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": True, "lora_dropout": 0.2},
        {"precision": "bf16"},
        {"max_steps": 0, "num_train_epochs": 0.2},
    ],
    ids=["full", "LoRA with dropout", "bf16", "by epochs"],
)
def test_an_interrupted_run_equals_an_uninterrupted_one_to_the_bit(
    changes: dict, settings_for: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 7,
        "validation_split": 0.05,
        "eval_strategy": "steps",
        "eval_steps": 3,
    } | changes
    straight, broken = (
        settings_for(out_dir=str(tmp_path / name), **changes) for name in ("straight", "broken")
    )
    expected = trainer.train(straight, MESH)
    with monkeypatch.context() as patch:
        interrupt_after(5, patch)
        with pytest.raises(Stop):
            trainer.train(broken, MESH)
    assert not (tmp_path / "broken/final").exists()
    summary = trainer.train(broken, MESH)
    first, second = (weights_of(tmp_path / name / "final") for name in ("straight", "broken"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses_of(straight.out_dir) == losses_of(broken.out_dir)
    assert [summary[name] for name in ("steps", "tokens", "eval_loss", "last_loss")] == [
        expected[name] for name in ("steps", "tokens", "eval_loss", "last_loss")
    ]


def test_a_named_checkpoint_is_resumed_and_none_starts_over(
    settings_for: Callable, tmp_path: Path
) -> None:
    settings = settings_for(save_strategy="steps", save_steps=2, save_total_limit=0)
    trainer.train(settings, MESH)
    final, losses = weights_of(tmp_path / "run/final"), losses_of(settings.out_dir)
    for resume in (str(tmp_path / "run/checkpoints/step-000002"), "none"):
        trainer.train(replace(settings, resume=resume), MESH)
        assert all(
            torch.equal(tensor, final[name])
            for name, tensor in weights_of(tmp_path / "run/final").items()
        )
        assert losses_of(settings.out_dir) == losses


def test_a_record_cut_off_by_a_power_cut_does_not_stop_the_run_that_goes_on(
    settings_for: Callable, tmp_path: Path
) -> None:
    settings = settings_for(save_strategy="steps", save_steps=2, save_total_limit=0)
    trainer.train(settings, MESH)
    metrics = tmp_path / "run/metrics.jsonl"
    losses = losses_of(settings.out_dir)
    metrics.write_text(metrics.read_text()[:-30])
    trainer.train(replace(settings, resume=str(tmp_path / "run/checkpoints/step-000004")), MESH)
    assert losses_of(settings.out_dir) == losses


def test_only_the_newest_checkpoints_are_kept(settings_for: Callable, tmp_path: Path) -> None:
    trainer.train(settings_for(save_strategy="steps", save_steps=1, save_total_limit=2), MESH)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == [
        "step-000004",
        "step-000005",
    ]


def test_a_finished_run_returns_its_summary_and_trains_nothing(
    settings_for: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(max_steps=2)
    summary = trainer.train(settings, MESH)
    interrupt_after(0, monkeypatch)
    assert trainer.train(settings, MESH) == summary
    with pytest.raises(Stop):
        trainer.train(settings, MESH, overwrite=True)


def test_a_changed_key_that_would_change_the_result_is_refused_by_name(
    settings_for: Callable,
) -> None:
    settings = settings_for(max_steps=2)
    trainer.train(settings, MESH)
    with pytest.raises(UserError, match=r"learning_rate was 0\.003, is 0\.5"):
        trainer.train(replace(settings, learning_rate=0.5), MESH)
    trainer.train(replace(settings, logging_steps=5, save_total_limit=7), MESH)


def test_a_directory_with_other_files_is_refused_and_left_alone(
    settings_for: Callable, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds files that no run of ours made"):
        trainer.train(settings_for(), MESH)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_mistake_can_be_mended_and_the_command_typed_again(settings_for: Callable) -> None:
    """A run that never took a step holds nothing worth protecting."""
    with pytest.raises(UserError, match="no such file"):
        trainer.train(settings_for(data=("alpaka.json",), max_steps=1), MESH)
    assert trainer.train(settings_for(max_steps=1), MESH)["steps"] == 1


def test_a_run_writes_what_the_interface_promises(
    settings_for: Callable, inputs: Path, tmp_path: Path
) -> None:
    settings = settings_for(
        validation_split=0.1, eval_strategy="steps", eval_steps=3, peak_tflops=1.0
    )
    summary = trainer.train(settings, MESH)
    out = tmp_path / "run"
    assert json.loads((out / "summary.json").read_text()) == summary
    assert {
        "train_loss",
        "eval_loss",
        "steps",
        "tokens",
        "tokens_per_second",
        "step_seconds",
        "tflops",
        "mfu",
        "peak_memory_bytes",
        "seconds",
    } <= summary.keys()
    records = read_metrics(out / "metrics.jsonl")
    assert {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "mfu",
        "peak_memory_bytes",
    } <= records[0].keys()
    assert [r["step"] for r in records if "eval_loss" in r] == [3, 6]
    for name in ("config.json", "model.safetensors", "tokenizer.model", "minillama.json"):
        assert (out / "final" / name).is_file()
    assert summary["train_loss"] == pytest.approx(sum(losses_of(out)) / 6)


def test_a_device_that_does_not_tell_its_memory_still_ends_with_words() -> None:
    summary = {
        "steps": 2,
        "tokens": 9,
        "last_loss": 1.0,
        "eval_loss": None,
        "seconds": 1.0,
        "tokens_per_second": 9.0,
    }
    assert "peak memory not told" in run.closing_words(
        TrainConfig(out_dir="runs/a"), summary | {"peak_memory_bytes": None}
    )


def test_evaluation_is_the_mean_loss_of_the_held_out_targets(settings_for: Callable) -> None:
    run = trainer.Trainer(settings_for(validation_split=0.1, per_device_eval_batch_size=3), MESH)
    batches = [
        batch
        for step in range(run.eval_plan.total_steps)
        for batch in run.eval_plan.micro_batches(step)
    ]
    with torch.no_grad():
        total = sum(float(run._loss_sum(batch)) for batch in batches)
    assert run.evaluate() == pytest.approx(
        total / sum(batch.targets for batch in batches), rel=1e-6
    )


@pytest.mark.parametrize("epochs", [1.0, 0.5, 2.0])
def test_an_epoch_is_every_target_once(epochs: float, settings_for: Callable) -> None:
    run = trainer.Trainer(settings_for(max_steps=0, num_train_epochs=epochs), MESH)
    seen = sum(
        batch.targets
        for step in range(run.plan.total_steps)
        for batch in run.plan.micro_batches(step)
    )
    assert seen == pytest.approx(
        epochs * run.plan.windows.targets.sum(), rel=0.0 if epochs >= 1 else 0.05
    )
    assert run.plan.epoch_at(run.plan.total_steps) == pytest.approx(epochs, abs=0.02)


def test_only_answers_are_trained_on_each_with_its_end(
    settings_for: Callable, inputs: Path
) -> None:
    """The targets of a packed batch, read as text, are answers of the file; each ends with the end token."""
    run = trainer.Trainer(settings_for(), MESH)
    answers = {record["output"] for record in json.loads((inputs / "alpaca.json").read_text())}
    batch = run.plan.micro_batches(0)[0]
    documents = torch.from_numpy(batch.labels).split(batch.lengths)
    assert len(documents) > 1
    for labels in documents:
        *answer, end = labels[labels != IGNORE].tolist()
        assert end == run.tokenizer.eos_id
        assert run.tokenizer.decode(answer) in answers


# What must not happen


def test_a_non_finite_loss_is_never_stepped_on_and_never_written_as_zero(
    settings_for: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_sum, calls = trainer.Trainer._loss_sum, []

    def poisoned(self: trainer.Trainer, batch: Batch) -> torch.Tensor:
        calls.append(self.step)
        return loss_sum(self, batch) * (math.nan if self.step == 1 else 1.0)

    monkeypatch.setattr(trainer.Trainer, "_loss_sum", poisoned)
    summary = trainer.train(settings_for(max_steps=3), MESH)
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert records[1]["loss"] is None
    assert "loss" in records[1]["non_finite"]
    assert summary["skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path / "run/final").values())
    assert math.isfinite(summary["train_loss"])


def test_a_skipped_step_leaves_the_weights_as_they_were(
    settings_for: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer.Trainer(settings_for(), MESH)
    before = flat_weights(run.optimizer).clone()
    monkeypatch.setattr(run, "_loss_sum", lambda batch: run.model.lm_head.weight.sum() * math.inf)
    loss, _ = run.update(run.plan.micro_batches(0), rate=1.0)
    assert not math.isfinite(loss)
    assert torch.equal(flat_weights(run.optimizer), before)
    assert run.optimizer.vectors[0].steps == 0


def test_a_run_that_is_lost_stops_with_the_step_and_a_remedy(
    settings_for: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        trainer.Trainer, "_loss_sum", lambda self, batch: self.model.lm_head.weight.sum() * math.nan
    )
    with pytest.raises(
        UserError, match=r"step 4: .*lm_head.weight.* 5 steps in a row; lower --learning_rate"
    ):
        trainer.train(settings_for(max_steps=9), MESH)


# Models that are built for a run


def test_n_layers_takes_the_first_layers_of_the_checkpoint(
    settings_for: Callable, inputs: Path
) -> None:
    run, whole = trainer.Trainer(settings_for(n_layers=1), MESH), load_model(inputs / "base")
    assert run.model.config.n_layers == len(run.model.model.layers) == 1
    assert torch.equal(
        run.model.model.layers[0].mlp.up_proj.weight, whole.model.layers[0].mlp.up_proj.weight
    )


def test_a_shape_that_is_not_the_checkpoints_is_refused_not_ignored(settings_for: Callable) -> None:
    trainer.Trainer(settings_for(dim=24), MESH)
    with pytest.raises(UserError, match=r"dim = 32, but .*base has 24; leave it out"):
        trainer.Trainer(settings_for(dim=32), MESH)


def test_a_larger_vocabulary_grows_the_embeddings_by_their_mean(
    settings_for: Callable, inputs: Path, tmp_path: Path
) -> None:
    larger = tmp_path / "larger.model"
    larger.write_bytes(
        train_tokenizer(
            [demo.records(("first",), 50, 0, False)[i]["instruction"] for i in range(50)], 340
        )
    )
    old, new = open_tokenizer(inputs / "tokenizer.model").size, open_tokenizer(larger).size
    assert new > old
    run = trainer.Trainer(settings_for(tokenizer=str(larger)), MESH)
    before = load_model(inputs / "base").model.embed_tokens.weight
    rows = run.model.model.embed_tokens.weight
    assert rows.shape[0] == run.model.config.vocab_size == new
    assert torch.equal(rows[:old], before)
    assert torch.allclose(rows[old:], before.mean(0).expand(new - old, -1), atol=1e-6)
    with pytest.raises(UserError, match="modules_to_save embed_tokens,lm_head"):
        trainer.Trainer(settings_for(tokenizer=str(larger), lora=True), MESH)


def test_a_model_from_scratch_follows_the_keys_and_the_seed(
    settings_for: Callable, inputs: Path
) -> None:
    shape = {
        "ckpt": "",
        "init": "scratch",
        "tokenizer": str(inputs / "tokenizer.model"),
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "ffn_dim": 48,
        "context": 96,
        "initializer_range": 0.1,
    }
    one, same, other = (
        trainer.Trainer(settings_for(**shape, seed=seed), MESH) for seed in (1, 1, 2)
    )
    made = one.model.config
    assert (
        made.dim,
        made.n_layers,
        made.n_heads,
        made.n_kv_heads,
        made.ffn_dim,
        made.head_dim,
    ) == (32, 2, 4, 2, 48, 8)
    assert torch.equal(flat_weights(one.optimizer), flat_weights(same.optimizer))
    assert not torch.equal(flat_weights(one.optimizer), flat_weights(other.optimizer))
    assert float(one.model.lm_head.weight.detach().std()) == pytest.approx(0.1, rel=0.05)


def test_plain_text_is_pretrained_on_every_token(settings_for: Callable, inputs: Path) -> None:
    run = trainer.Trainer(settings_for(data=(str(inputs / "text.txt"),)), MESH)
    batch = run.plan.micro_batches(0)[0]
    assert batch.targets >= len(batch.tokens) - 1


@torch.no_grad()
def test_final_opens_in_transformers_and_in_peft(
    settings_for: Callable, inputs: Path, tmp_path: Path
) -> None:
    tokens, final = random_tokens(1, 20, vocab_size=320), tmp_path / "run/final"
    with torch.enable_grad():
        trainer.train(settings_for(), MESH)
    full = load_model(final)
    assert_same_logits(full.logits(full(tokens)), open_in_transformers(final)(tokens).logits)
    with torch.enable_grad():
        trainer.train(settings_for(lora=True), MESH, overwrite=True)
    adapted = load_model(inputs / "base")
    load_adapter(adapted, final)
    assert_same_logits(
        adapted.logits(adapted(tokens)), open_in_peft(inputs / "base", final)(tokens).logits
    )


def test_rows_longer_than_the_context_are_refused(settings_for: Callable) -> None:
    with pytest.raises(UserError, match="max_length = 129 exceeds the model's context of 128"):
        trainer.Trainer(settings_for(max_length=129), MESH)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_a_real_llama_learns_real_instructions(lora: bool, shared: Path, tmp_path: Path) -> None:
    base, train_file = shared / "models/stories260K", shared / "sft/alpaca_en_demo.json"
    settings = TrainConfig(
        ckpt=str(base),
        data=(str(train_file),),
        validation_split=0.04,
        lora=lora,
        lora_targets=("all",),
        max_length=512,
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        save_strategy="no",
        cache_dir=str(tmp_path),
        out_dir=str(tmp_path / "run"),
        device="cpu",
    )
    before = trainer.Trainer(settings, MESH).evaluate()
    after = trainer.train(settings, MESH)["eval_loss"]
    assert after < before - 0.1
    final, tokens = tmp_path / "run/final", random_tokens(1, 20, vocab_size=512)
    with torch.no_grad():
        assert (
            (open_in_peft(base, final) if lora else open_in_transformers(final))(tokens)
            .logits.isfinite()
            .all()
        )


# Figures


@pytest.mark.parametrize(
    ("model", "vocabulary", "sequence", "batch", "seconds", "recompute", "published_tflops"),
    [
        ("7b", 32000, 4096, 16, 3.08, False, 122.39),
        ("13b", 49954, 256, 256, 5.26, True, 160.41),
        ("13b", 32000, 4096, 256, 93.45, False, 120.69),
    ],
)
def test_the_flops_formula_gives_the_published_tables(
    model: str,
    vocabulary: int,
    sequence: int,
    batch: int,
    seconds: float,
    recompute: bool,
    published_tflops: float,
) -> None:
    """AscendSpeed's tables of LLaMA2-7B, Chinese-LLaMA-Alpaca-13B and LLaMA2-13B on 8 devices; they round the seconds."""
    config = replace(published(model), vocab_size=vocabulary)
    tflops = training_flops(config, batch * sequence, sequence, recompute) / seconds / 8 / 1e12
    assert tflops == pytest.approx(published_tflops, rel=0.01)


def test_smoothing_starts_at_the_first_loss_and_follows_the_rest() -> None:
    assert smoothed([3.0]) == [3.0]
    assert smoothed([2.0] * 10) == pytest.approx([2.0] * 10)
    w = 1.8 * (1 / (1 + math.exp(-0.1)) - 0.5)
    assert smoothed([1.0, 0.0]) == pytest.approx([1.0, w])


# Ranks


def train_on_this_rank(settings: TrainConfig) -> dict:
    with comm.start("cpu", timeout_minutes=1) as mesh:
        return trainer.train(settings, mesh)


@pytest.mark.parametrize(
    "changes", [{}, {"lora": True, "lora_dropout": 0.1}], ids=["full", "LoRA with dropout"]
)
def test_two_ranks_train_on_the_same_global_batch_as_one(
    changes: dict, settings_for: Callable, tmp_path: Path
) -> None:
    one = settings_for(
        out_dir=str(tmp_path / "one"),
        gradient_accumulation_steps=2,
        validation_split=0.1,
        **changes,
    )
    two = settings_for(
        out_dir=str(tmp_path / "two"),
        gradient_accumulation_steps=1,
        validation_split=0.1,
        **changes,
    )
    expected = trainer.train(one, MESH)
    first, second = run_on_ranks(2, train_on_this_rank, two)
    assert losses_of(two.out_dir) == pytest.approx(losses_of(one.out_dir), rel=1e-5)
    assert (
        first["eval_loss"] == second["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    )
    assert first["tokens"] == expected["tokens"]


def train_in_fp16(settings: TrainConfig, overflows: set[int]) -> dict | str:
    """Train in fp16, which our ops can do on the processor too; in these steps the gradient of rank 1 overflows, its loss does not."""
    run.compute_dtype = lambda precision, where: (torch.float16, "")
    original = trainer.Trainer.__init__

    def poisoned(self: trainer.Trainer, *arguments) -> None:
        original(self, *arguments)
        last = self.mesh.rank == self.mesh.size - 1
        self.model.model.norm.weight.register_hook(
            lambda grad: grad * math.inf if last and self.step in overflows else grad
        )

    trainer.Trainer.__init__ = poisoned
    try:
        return train_on_this_rank(settings)
    except UserError as error:
        return str(error)


def test_fp16_skips_overflows_on_all_ranks_and_scales_as_deepspeeds_file_says(
    settings_for: Callable, tmp_path: Path
) -> None:
    """From 2^10, hysteresis 2, window 3: the second overflow halves, three good steps double and restore the hysteresis."""
    (tmp_path / "ds.json").write_text(
        json.dumps(
            {
                "fp16": {
                    "enabled": True,
                    "loss_scale": 0,
                    "initial_scale_power": 10,
                    "loss_scale_window": 3,
                    "hysteresis": 2,
                    "min_loss_scale": 256,
                }
            }
        )
    )
    settings = settings_for(**deepspeed.read(tmp_path / "ds.json", 2), max_steps=8, zero_stage=2)
    first, second = run_on_ranks(2, train_in_fp16, settings, {1, 2, 6})
    assert first["skipped_steps"] == second["skipped_steps"] == 3
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [record["loss_scale"] for record in records] == [
        1024,
        1024,
        512,
        512,
        512,
        1024,
        1024,
        1024,
    ]
    assert [record["skipped"] for record in records] == [0, 1, 2, 2, 2, 2, 3, 3]
    assert [record["grad_norm"] is None for record in records] == [
        step in (1, 2, 6) for step in range(8)
    ]
    assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path / "run/final").values())


def test_fp16_may_look_for_its_scale_for_long_but_not_below_its_minimum(
    settings_for: Callable,
) -> None:
    settings = settings_for(
        precision="fp16", initial_scale_power=10, loss_scale_hysteresis=1, max_steps=9
    )
    assert run_on_ranks(2, train_in_fp16, settings, set(range(7)))[1]["skipped_steps"] == 7
    stopped = run_on_ranks(
        2,
        train_in_fp16,
        replace(settings, min_loss_scale=256.0, out_dir=settings.out_dir + "2"),
        set(range(7)),
    )
    assert all("overflow at the smallest loss scale 256" in message for message in stopped)
