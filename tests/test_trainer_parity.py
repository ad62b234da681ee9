"""Fifty losses of transformers and of peft with torch's AdamW, and what both open afterwards."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minillama.checkpoint.hf_reader import load_model
from minillama.comm import Mesh
from minillama.data.windows import Batch
from minillama.lora import load_adapter
from minillama.ops import IGNORE
from minillama.train_config import TrainConfig
from minillama.training.saving import write_model
from minillama.training.trainer import Trainer, train
from tests.conftest import random_tokens
from tests.peers import assert_same_logits, open_in_peft, open_in_transformers
from tests.runs import losses_of, new_trainer, torch_adamw

MESH = Mesh()


def padded(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The documents of a packed batch as rows of their own: ids, attention mask, labels.

    A label is the next token, as ours are.
    """

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


def their_losses(model: torch.nn.Module, trainer: Trainer, steps: int) -> list[float]:
    """The same batches with a model of transformers or peft, torch's AdamW, their schedule."""
    transformers = pytest.importorskip("transformers")
    optimizer, losses = torch_adamw(model.train()), []
    for group in optimizer.param_groups:
        group["lr"] = trainer.config.learning_rate
    schedule = transformers.get_cosine_schedule_with_warmup(
        optimizer, math.ceil(steps * trainer.config.warmup_ratio), steps
    )
    for step in range(steps):
        batches = trainer.run.train_batches.micro_batches(step)
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
            [p for p in model.parameters() if p.requires_grad], trainer.config.max_grad_norm
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
    trainer = new_trainer(settings)
    theirs = their_losses(open_in_transformers(inputs / "base"), trainer, 50)
    train(settings, MESH)
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
    trainer = new_trainer(settings)
    write_model(trainer.run, tmp_path / "first")  # the random A that both start from
    theirs = their_losses(
        open_in_peft(inputs / "base", tmp_path / "first", trainable=True), trainer, 50
    )
    train(settings, MESH)
    assert losses_of(settings.out_dir) == pytest.approx(theirs, rel=1e-4)


@torch.no_grad()
def test_final_opens_in_transformers_and_in_peft(
    settings_for: Callable, inputs: Path, tmp_path: Path
) -> None:
    tokens, final = random_tokens(1, 20, vocab_size=320), tmp_path / "run/final"
    with torch.enable_grad():
        train(settings_for(), MESH)
    full = load_model(final)
    assert_same_logits(full.logits(full(tokens)), open_in_transformers(final)(tokens).logits)
    with torch.enable_grad():
        train(settings_for(lora=True), MESH, overwrite=True)
    adapted = load_model(inputs / "base")
    load_adapter(adapted, final)
    assert_same_logits(
        adapted.logits(adapted(tokens)), open_in_peft(inputs / "base", final)(tokens).logits
    )


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
    before = new_trainer(settings).evaluate()
    after = train(settings, MESH)["eval_loss"]
    assert after < before - 0.1
    final, tokens = tmp_path / "run/final", random_tokens(1, 20, vocab_size=512)
    with torch.no_grad():
        assert (
            (open_in_peft(base, final) if lora else open_in_transformers(final))(tokens)
            .logits.isfinite()
            .all()
        )
