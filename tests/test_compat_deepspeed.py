"""DeepSpeed's JSON files: what they fix becomes a key of ours, what cannot be honoured is named."""

import json

import pytest

from minillama.compat import deepspeed
from minillama.errors import UserError


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"zero_optimization": {"stage": 3}}, "weights are not sharded here"),
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
        (
            {
                "train_batch_size": 100,
                "train_micro_batch_size_per_gpu": 8,
                "gradient_accumulation_steps": 2,
            },
            "100 is not .*8 × .*2 × 4 ranks = 64",
        ),
    ],
)
def test_a_deepspeed_file_that_asks_for_more_is_refused(change, named, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(change))
    with pytest.raises(UserError, match=named):
        deepspeed.read(tmp_path / "ds.json", world_size=4)


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
    assert deepspeed.read(tmp_path / "ds.json", world_size=4) == {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "precision": "bf16",
        "learning_rate": 1e-4,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 0.5,
    }
