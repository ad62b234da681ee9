"""DeepSpeed's JSON files: what they fix becomes a key of ours, what cannot be honoured is named."""

import json

import pytest

import train
from minillama.compat import deepspeed
from minillama.errors import UserError


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"zero_optimization": {"stage": 4}}, "zero_stage = 4; choose one of: 0, 1, 2"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer.device = 'cpu'",
        ),
        (
            {"zero_optimisation": {"stage": 2}},
            "zero_optimisation.stage = 2: not supported .did you mean 'zero_optimization.stage'",
        ),
        (
            {"optimizer": {"type": "Lamb"}},
            "optimizer.type = 'Lamb': not supported; supported: 'Adam', 'AdamW'",
        ),
        (
            {"zero_optimization": {"stage": "two"}},
            "zero_optimization.stage = 'two': a value is wrong",
        ),
        (
            {"optimizer": {"params": {"betas": 0.9}}},
            "optimizer.params.betas = 0.9: a value is wrong",
        ),
        ({"zero_optimization": {"stage": 1.5}}, "stage = 1.5: .*expected a whole number"),
        ({"zero_optimization": {"stage": True}}, "stage = True: .*expected a number"),
        ({"zero_optimization": {"stagee": "auto"}}, "stagee = 'auto': not supported .did you mean"),
        ({"optimizer": {"params": {"lr": "1e-4"}}}, "lr = '1e-4': .*expected a number"),
        ({"optimizer": {"params": {"lr": -1}}}, "learning_rate = -1.0: must not be negative"),
        ({"gradient_clipping": float("nan")}, "gradient_clipping = nan"),
        ({"train_batch_size": "many"}, "train_batch_size = 'many'"),
        ({"fp16": {"enabled": "maybe"}}, "fp16.enabled = 'maybe': expected true, false or"),
        ({"bf16": {"enabled": 1}}, "bf16.enabled = 1: expected true, false or"),
        ({"fp16": {"enabled": None}}, "fp16.enabled = None"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "exclude each other"),
        ({"scheduler": {"type": "auto"}}, "scheduler.type = 'auto': not supported"),
    ],
)
def test_a_deepspeed_file_that_asks_for_more_is_refused(change, named, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(change))
    with pytest.raises(UserError, match=named):
        deepspeed.read(tmp_path / "ds.json")


@pytest.mark.parametrize(
    ("change", "flags", "named"),
    [
        (
            {
                "train_batch_size": 100,
                "train_micro_batch_size_per_gpu": 8,
                "gradient_accumulation_steps": 2,
            },
            "",
            "100 is not .*8 × .*2 × 4 data ranks = 64",
        ),
        ({"train_batch_size": 64}, "--gradient_accumulation_steps 3", "64 is not .* = 36"),
        ({"fp16": {"enabled": False}}, "--fp16", "fp16.enabled = False, but the precision .*fp16"),
        ({"fp16": {"enabled": True}}, "--bf16", "fp16.enabled = True, but the precision .*bf16"),
        ({"bf16": {"enabled": False}}, "--config 7b_lora", "bf16.enabled = False, but"),
    ],
)
def test_settings_that_contradict_a_deepspeed_file_are_refused(change, flags, named, tmp_path):
    """transformers refuses them too; a file may leave anything open."""
    (tmp_path / "ds.json").write_text(json.dumps(change))
    given = [*flags.split(), "--deepspeed", str(tmp_path / "ds.json"), "--world_size", "4"]
    with pytest.raises(UserError, match=named):
        train.parse(["--dry_run", *given])


def test_every_mapped_entry_sets_its_key(tmp_path):
    """Each number is another one, so that no two can be confused."""
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 5,
        "gradient_clipping": 0.7,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 2e8},
        "optimizer": {
            "params": {"lr": 1e-4, "betas": [0.8, 0.96], "eps": 1e-7, "weight_decay": 0.2}
        },
        "fp16": {
            "enabled": True,
            "initial_scale_power": 12,
            "loss_scale_window": 77,
            "hysteresis": 4,
            "min_loss_scale": 0.5,
        },
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    expected = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 5,
        "max_grad_norm": 0.7,
        "zero_stage": 2,
        "bucket_elements": 200_000_000,
        "learning_rate": 1e-4,
        "adam_beta1": 0.8,
        "adam_beta2": 0.96,
        "adam_epsilon": 1e-7,
        "weight_decay": 0.2,
        "initial_scale_power": 12,
        "loss_scale_window": 77,
        "loss_scale_hysteresis": 4,
        "min_loss_scale": 0.5,
        "precision": "fp16",
    }
    assert set(deepspeed.KEY_NAMES.values()) <= expected.keys()
    settings, _ = train.parse(["--deepspeed", str(tmp_path / "ds.json")])
    assert {name: getattr(settings, name) for name in expected} == expected


def test_a_deepspeed_file_sets_what_it_fixes_and_leaves_auto_to_the_command_line(tmp_path):
    config = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": "auto"}},
        "gradient_clipping": 0.5,
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    assert deepspeed.read(tmp_path / "ds.json").keys == {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "precision": "bf16",
        "learning_rate": 1e-4,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 0.5,
    }
