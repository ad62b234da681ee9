"""Models that are built for a run, and activations that are computed twice."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillama.checkpoint.hf_reader import load_model
from minillama.data import demo
from minillama.errors import UserError
from minillama.lora import LoraConfig, save_adapter
from minillama.tokenizer import open_tokenizer, train_tokenizer
from minillama.training.architecture import find_adapter
from minillama.training.model_building import recompute_activations
from tests.adapters import with_random_adapter
from tests.conftest import random_model
from tests.runs import flat_weights, loss_of, new_trainer


def test_n_layers_takes_the_first_layers_of_the_checkpoint(
    settings_for: Callable, inputs: Path
) -> None:
    trainer, whole = new_trainer(settings_for(n_layers=1)), load_model(inputs / "base")
    assert trainer.model.config.n_layers == len(trainer.model.model.layers) == 1
    assert torch.equal(
        trainer.model.model.layers[0].mlp.up_proj.weight, whole.model.layers[0].mlp.up_proj.weight
    )


def test_a_shape_that_is_not_the_checkpoints_is_refused_not_ignored(settings_for: Callable) -> None:
    new_trainer(settings_for(dim=24))
    with pytest.raises(UserError, match=r"dim = 32, but .*base has 24; leave it out"):
        new_trainer(settings_for(dim=32))


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
    trainer = new_trainer(settings_for(tokenizer=str(larger), grow_vocabulary=True))
    before = load_model(inputs / "base").model.embed_tokens.weight
    rows = trainer.model.model.embed_tokens.weight
    assert rows.shape[0] == trainer.model.config.vocab_size == new
    assert torch.equal(rows[:old], before)
    assert torch.allclose(rows[old:], before.mean(0).expand(new - old, -1), atol=1e-6)
    with pytest.raises(UserError, match="modules_to_save embed_tokens,lm_head"):
        new_trainer(settings_for(tokenizer=str(larger), lora=True, grow_vocabulary=True))


@pytest.fixture
def larger_tokenizer(tmp_path: Path) -> str:
    texts = [record["instruction"] for record in demo.records(("first",), 50, 0, False)]
    (tmp_path / "larger.model").write_bytes(train_tokenizer(texts, 340))
    return str(tmp_path / "larger.model")


def test_a_vocabulary_that_does_not_fit_is_refused_unless_growth_is_asked_for(
    settings_for: Callable, larger_tokenizer: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(UserError, match=r"grows from 320 to \d+ tokens.* add --grow_vocabulary"):
        new_trainer(settings_for(tokenizer=larger_tokenizer))
    new_trainer(settings_for(tokenizer=larger_tokenizer, grow_vocabulary=True))
    assert "WARNING: the vocabulary grows from 320 to" in capsys.readouterr().out


def test_training_warns_of_a_tokenizer_whose_first_tokens_are_not_the_checkpoints(
    settings_for: Callable, inputs: Path, larger_tokenizer: str, capsys: pytest.CaptureFixture
) -> None:
    """As after merging two vocabularies in the wrong order: the number of tokens is right."""
    base = inputs.parent / "with_tokenizer"
    shutil.copytree(inputs / "base", base, dirs_exist_ok=True)
    own = shutil.copy(inputs / "tokenizer.model", base / "tokenizer.model")
    other = "is not the tokenizer of this model: id "
    new_trainer(settings_for(ckpt=str(base), tokenizer=larger_tokenizer, grow_vocabulary=True))
    assert f"WARNING: {larger_tokenizer} {other}" in capsys.readouterr().out
    new_trainer(settings_for(ckpt=str(base), tokenizer=str(own)))
    assert other not in capsys.readouterr().out


def test_a_run_from_an_adapter_warns_of_another_dropout(
    settings_for: Callable, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lora = LoraConfig(dropout=0.125)
    save_adapter(with_random_adapter(load_model(inputs / "base"), lora), lora, tmp_path, "")
    settings = {"lora": True, "adapter": str(tmp_path)}
    new_trainer(settings_for(**settings))
    warning = f"{tmp_path} was trained with lora_dropout = 0.125, and this run takes 0.0; "
    assert f"WARNING: {warning}--lora_dropout 0.125 keeps it" in capsys.readouterr().out
    new_trainer(settings_for(**settings, lora_dropout=0.125))
    assert "WARNING" not in capsys.readouterr().out


def test_modules_to_save_ask_for_growth_in_megatrons_names_too(
    settings_for: Callable, larger_tokenizer: str
) -> None:
    names = ("word_embeddings", "lm_head.lm_head")
    trainer = new_trainer(
        settings_for(tokenizer=larger_tokenizer, lora=True, modules_to_save=names)
    )
    assert trainer.model.config.vocab_size == open_tokenizer(larger_tokenizer).size


def test_growth_that_is_allowed_changes_nothing_where_the_tokenizer_fits(
    settings_for: Callable, capsys: pytest.CaptureFixture
) -> None:
    assert new_trainer(settings_for(grow_vocabulary=True)).model.config.vocab_size == 320
    assert "WARNING" not in capsys.readouterr().out


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
    one, same, other = (new_trainer(settings_for(**shape, seed=seed)) for seed in (1, 1, 2))
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


def test_rows_longer_than_the_context_are_refused(settings_for: Callable) -> None:
    with pytest.raises(UserError, match="max_length = 129 exceeds the model's context of 128"):
        new_trainer(settings_for(max_length=129))


def test_a_run_stands_for_the_adapter_in_its_final(settings_for: Callable, tmp_path: Path) -> None:
    lora = {"lora": True, "lora_rank": 4, "max_steps": 1}
    first = settings_for(**lora)
    new_trainer(first).train()
    for name in ("run", "run/final"):
        adapter = tmp_path / name
        again = settings_for(**lora, adapter=str(adapter), out_dir=str(tmp_path / "again"))
        assert find_adapter(again) == tmp_path / "run/final"
        state = new_trainer(again).model.state_dict()
        saved = load_file(tmp_path / "run/final/adapter_model.safetensors")
        name_of_b = "model.layers.0.self_attn.q_proj.lora_B"
        (value,) = [v for k, v in saved.items() if k.endswith(f"{name_of_b}.weight")]
        (ours,) = [v for k, v in state.items() if k.startswith(name_of_b)]
        assert torch.equal(ours, value)
        assert value.any(), "trained: it is zero at the start"


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
