"""The training loop: any split of a batch gives its gradient; bad steps are skipped."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minillama.comm import Mesh
from minillama.data.windows import Batch
from minillama.errors import UserError
from minillama.loss_curves import read_metrics
from minillama.ops import IGNORE
from minillama.training.trainer import Trainer, train
from tests.runs import flat_gradient, flat_weights, new_trainer, weights_of

MESH = Mesh()


@pytest.mark.parametrize(
    "split", [(1, 8), (2, 4), (4, 2), (8, 1)], ids=lambda s: f"{s[1]} micro-batches of {s[0]}"
)
def test_any_split_of_a_global_batch_gives_the_same_gradient(
    split: tuple[int, int], settings_for: Callable
) -> None:
    """Rows hold different numbers of targets; a mean of the micro-batches' means would not pass."""

    def gradient(micro: int, accumulation: int) -> torch.Tensor:
        trainer = new_trainer(
            settings_for(
                per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation
            )
        )
        batches = trainer.run.train_batches.micro_batches(0)
        assert len(batches) == accumulation
        trainer.update(batches, rate=0.0)
        return flat_gradient(trainer.optimizer)

    whole, parts = gradient(8, 1), gradient(*split)
    assert (whole - parts).abs().max() <= 1e-5 * whole.abs().max()


def test_recomputation_with_dropout_draws_the_same_again(settings_for: Callable) -> None:
    gradients = []
    for recompute in (False, True):
        trainer = new_trainer(
            settings_for(lora=True, lora_dropout=0.3, gradient_checkpointing=recompute)
        )
        torch.nn.init.normal_(
            trainer.model.model.layers[0].self_attn.q_proj.lora_B,
            generator=torch.Generator().manual_seed(0),
        )
        trainer.update(trainer.run.train_batches.micro_batches(0), rate=0.0)
        gradients.append(flat_gradient(trainer.optimizer))
    assert torch.equal(*gradients)


def test_evaluation_is_the_mean_loss_of_the_held_out_targets(settings_for: Callable) -> None:
    trainer = new_trainer(settings_for(validation_split=0.1, per_device_eval_batch_size=3))
    batches = [
        batch
        for step in range(trainer.run.eval_batches.total_steps)
        for batch in trainer.run.eval_batches.micro_batches(step)
    ]
    with torch.no_grad():
        total = sum(float(trainer.loss_sum(batch)) for batch in batches)
    assert trainer.evaluate() == pytest.approx(
        total / sum(batch.targets for batch in batches), rel=1e-6
    )


def test_evaluation_has_no_dropout_and_training_goes_on_with_it(settings_for: Callable) -> None:
    losses = []
    for dropout in (0.0, 0.5):
        settings = settings_for(validation_split=0.1, lora=True, lora_dropout=dropout)
        trainer = new_trainer(settings)
        factor = trainer.model.model.layers[0].self_attn.q_proj.lora_B
        torch.nn.init.normal_(factor, generator=torch.Generator().manual_seed(0))
        losses.append(trainer.evaluate())
        assert all(module.training for module in trainer.model.modules())
    assert losses[0] == losses[1]


def test_dropout_differs_by_step_micro_batch_and_seed(settings_for: Callable) -> None:
    trainer = new_trainer(settings_for())
    seeds = [trainer.dropout_seed(0), trainer.dropout_seed(1)]
    trainer.step = 1
    seeds += [trainer.dropout_seed(0), trainer.dropout_seed(1)]
    seeds.append(new_trainer(settings_for(seed=1)).dropout_seed(0))
    assert len(set(seeds)) == 5


def test_the_first_and_the_last_step_are_always_recorded(
    settings_for: Callable, tmp_path: Path
) -> None:
    train(settings_for(max_steps=5, logging_steps=3), MESH)
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [record["step"] for record in records] == [1, 3, 5]


@pytest.mark.parametrize("epochs", [1.0, 0.5, 2.0])
def test_an_epoch_is_every_target_once(epochs: float, settings_for: Callable) -> None:
    trainer = new_trainer(settings_for(max_steps=0, num_train_epochs=epochs))
    seen = sum(
        batch.targets
        for step in range(trainer.run.train_batches.total_steps)
        for batch in trainer.run.train_batches.micro_batches(step)
    )
    assert seen == pytest.approx(
        epochs * trainer.run.train_batches.windows.targets.sum(), rel=0.0 if epochs >= 1 else 0.05
    )
    assert trainer.run.train_batches.epoch_at(
        trainer.run.train_batches.total_steps
    ) == pytest.approx(epochs, abs=0.02)


def test_only_answers_are_trained_on_each_with_its_end(
    settings_for: Callable, inputs: Path
) -> None:
    """The targets of a packed batch are answers of the file, each with EOS at its end."""
    trainer = new_trainer(settings_for())
    answers = {record["output"] for record in json.loads((inputs / "alpaca.json").read_text())}
    batch = trainer.run.train_batches.micro_batches(0)[0]
    documents = torch.from_numpy(batch.labels).split(batch.lengths)
    assert len(documents) > 1
    for labels in documents:
        *answer, end = labels[labels != IGNORE].tolist()
        assert end == trainer.run.tokenizer.eos_id
        assert trainer.run.tokenizer.decode(answer) in answers


def test_plain_text_is_pretrained_on_every_token(settings_for: Callable, inputs: Path) -> None:
    trainer = new_trainer(settings_for(data=(str(inputs / "text.txt"),)))
    batch = trainer.run.train_batches.micro_batches(0)[0]
    assert batch.targets >= len(batch.tokens) - 1


def test_a_non_finite_loss_is_never_stepped_on_and_never_written_as_zero(
    settings_for: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_sum, calls = Trainer.loss_sum, []

    def poisoned(self: Trainer, batch: Batch) -> torch.Tensor:
        calls.append(self.step)
        return loss_sum(self, batch) * (math.nan if self.step == 1 else 1.0)

    monkeypatch.setattr(Trainer, "loss_sum", poisoned)
    summary = train(settings_for(max_steps=3), MESH)
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert records[1]["loss"] is None
    assert "loss" in records[1]["non_finite"]
    assert summary["skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path / "run/final").values())
    assert math.isfinite(summary["train_loss"])


def test_a_skipped_step_leaves_the_weights_as_they_were(
    settings_for: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = new_trainer(settings_for())
    before = flat_weights(trainer.optimizer).clone()
    monkeypatch.setattr(
        trainer, "loss_sum", lambda batch: trainer.model.lm_head.weight.sum() * math.inf
    )
    result = trainer.update(trainer.run.train_batches.micro_batches(0), rate=1.0)
    assert not math.isfinite(result.loss)
    assert torch.equal(flat_weights(trainer.optimizer), before)
    assert trainer.optimizer.vectors[0].steps == 0


def test_a_run_that_is_lost_stops_with_the_step_and_a_remedy(
    settings_for: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Trainer, "loss_sum", lambda self, batch: self.model.lm_head.weight.sum() * math.nan
    )
    with pytest.raises(
        UserError, match=r"step 4: .*lm_head.weight.* 5 steps in a row; lower --learning_rate"
    ):
        train(settings_for(max_steps=9), MESH)


def test_a_run_from_python_needs_its_settings_only(settings_for: Callable, tmp_path: Path) -> None:
    summary = train(settings_for(max_steps=1))
    assert summary == json.loads((tmp_path / "run/summary.json").read_text())
    with pytest.raises(UserError, match="--ckpt LLAMA_DIR"):
        train(settings_for(ckpt=""))
    with pytest.raises(UserError, match="name a run directory"):
        train(settings_for(out_dir=""))
