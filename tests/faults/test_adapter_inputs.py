"""Adapters that are damaged, absurd, or made for another base: one line, and nothing is written."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillama.checkpoint.hf_reader import load_model, open_weights
from minillama.conversion.merge import merge_lora
from minillama.conversion.merge_check import ModelOnDisk, compare
from minillama.conversion.writer import Output
from minillama.errors import UserError
from minillama.lora import load_adapter
from minillama.tokenizer import train_tokenizer
from tests.conversions import HEAD, factors, peft_adapter, plain_adapter

NAN = math.nan
HUGE = int("9" * 400)
CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r is 0, expected a rank"),
    ({"r": -1}, "r is -1"),
    ({"r": True}, "r is True"),
    ({"r": 2.5}, r"r is 2\.5"),
    ({"lora_alpha": NAN}, "lora_alpha is nan"),
    ({"lora_alpha": math.inf}, "lora_alpha is inf"),
    ({"lora_alpha": HUGE}, "wrong"),
    ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    ({"lora_dropout": 1.5}, r"lora_dropout is 1\.5"),
    ({"rank_pattern": [1]}, r"rank_pattern is \[1\]"),
    ({"rank_pattern": {"q_proj": 0}}, "q_proj is 0, expected a rank"),
    ({"rank_pattern": {"([": 2}}, r"rank_pattern: pattern '\(\['"),
    ({"alpha_pattern": {"q_proj": NAN}}, "q_proj is nan"),
    ({"alpha_pattern": {"(a": 1}}, r"a \( without its \)"),
    ({"target_modules": "(["}, "target_modules: pattern"),
    ({"target_modules": [5]}, r"target_modules is \[5\]"),
    ({"target_modules": {"q_proj": 1}}, "target_modules is"),
    ({"target_modules": [""]}, "expected a list of names"),
    ({"exclude_modules": "*"}, "exclude_modules: pattern"),
    ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'"),
    ({"layers_to_transform": ["0"]}, "layers_to_transform is"),
    ({"layers_pattern": "(", "layers_to_transform": [0]}, "without its"),
    ({"use_rslora": "maybe"}, "use_rslora is 'maybe'"),
    ({"base_model_name_or_path": [1]}, "base_model_name_or_path is"),
    ({"a_key_of_tomorrow": 3}, "a_key_of_tomorrow = 3 is not supported"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora = .* is not supported"),
    ({"target_modules": ["q_proj", "v_proj"]}, "v_proj.lora_A.weight is missing"),
]


@pytest.mark.parametrize(("config", "message"), CONFIGS, ids=str)
def test_an_absurd_configuration_is_refused_by_key(
    config: dict[str, Any], message: str, tmp_path: Path, tiny_checkpoint
) -> None:
    base = tiny_checkpoint()
    adapter = plain_adapter(tmp_path / "a", factors(), **config)
    with pytest.raises(UserError, match=message):
        merge_lora(base, [adapter], Output(tmp_path / "out"))
    if "base_model_name_or_path" not in config:
        with pytest.raises(UserError, match=message):
            load_adapter(load_model(base), adapter)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["lora_A", "lora_B", "lm_head"])
def test_nan_and_infinity_in_an_adapter_are_refused_by_name(
    place: str, value: float, tmp_path: Path, tiny_checkpoint
) -> None:
    base = tiny_checkpoint()
    tensors = factors() | {"base_model.model.lm_head.weight": torch.ones(50, 24)}
    name = next(name for name in tensors if place in name)
    tensors[name][1, 1] = value
    adapter = plain_adapter(tmp_path / "a", tensors)
    for action in (
        lambda: merge_lora(base, [adapter], Output(tmp_path / "out")),
        lambda: load_adapter(load_model(base), adapter),
    ):
        with pytest.raises(UserError, match=rf"{name} holds NaN or infinity"):
            action()
    assert not (tmp_path / "out").exists()


def test_nan_in_a_weight_of_the_base_is_refused_by_name(tmp_path: Path, tiny_checkpoint) -> None:
    base = tiny_checkpoint()
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.input_layernorm.weight"
    tensors[name][3] = NAN
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} holds NaN or infinity"):
        merge_lora(base, [plain_adapter(tmp_path / "a", factors())], Output(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_sum_beyond_the_range_of_the_output_is_refused(tmp_path: Path, tiny_checkpoint) -> None:
    tensors = {name: 300 * tensor for name, tensor in factors().items()}
    adapter = plain_adapter(tmp_path / "a", tensors)
    output = Output(tmp_path / "out", dtype=torch.float16)
    with pytest.raises(UserError, match=r"q_proj\.weight: a value is too large for float16"):
        merge_lora(tiny_checkpoint(), [adapter], output)
    assert not (tmp_path / "out").exists()


def test_an_index_that_names_no_file_is_refused(tmp_path: Path) -> None:
    for name in ("", ".", "..", "a/b", 5):
        index = {"weight_map": {"lm_head.weight": name}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError):
            open_weights(tmp_path)


def test_the_check_of_the_whole_model_sees_a_head_that_followed(tiny_checkpoint) -> None:
    """The fault it is for: a tied head that changes because the embedding did."""
    base = tiny_checkpoint()
    model = load_model(base)
    weights = dict(open_weights(base))
    other = tiny_checkpoint("other", seed=1)
    right = ModelOnDisk(model.config, weights)
    wrong = ModelOnDisk(model.config, weights | {HEAD: open_weights(other)[HEAD]})
    assert compare(right, right, torch.float32, seed=0) == 0
    with pytest.raises(UserError, match="the merged model differs"):
        compare(wrong, right, torch.float32, seed=0)


def grown_adapter(base: Path, directory: Path, rows: int = 57) -> Path:
    peft_adapter(base, directory, rows=rows, modules_to_save=["embed_tokens", "lm_head"])
    return directory


def test_rows_that_no_tokenizer_knows_are_a_warning(tmp_path: Path, tiny_checkpoint) -> None:
    base = tiny_checkpoint(vocab_size=300)
    (base / "tokenizer.model").write_bytes(train_tokenizer(["a b c d e f g"] * 9, 280))
    adapter = grown_adapter(base, tmp_path / "a", rows=310)
    report = merge_lora(base, [adapter], Output(tmp_path / "out"))
    assert "warning: the adapters enlarge the embedding to 310 rows" in str(report)
    assert str(base) in str(report)


def test_an_adapter_of_another_base_is_a_warning(tmp_path: Path, tiny_checkpoint) -> None:
    base = tiny_checkpoint("base")
    other = tiny_checkpoint("other", seed=5)
    peft_adapter(other, tmp_path / "a")
    report = merge_lora(base, [tmp_path / "a"], Output(tmp_path / "out"))
    assert f"a was trained on {other}, which has another model.norm.weight" in str(report)
    peft_adapter(base, tmp_path / "b")
    clean = merge_lora(base, [tmp_path / "b"], Output(tmp_path / "clean"))
    assert "was trained on" not in str(clean)
    grown = grown_adapter(base, tmp_path / "grown")
    second = merge_lora(base, [grown, tmp_path / "b"], Output(tmp_path / "second"))
    assert "has 50 rows of vocabulary; here it is merged into 57" in str(second)


def test_the_last_adapters_companions_win(tmp_path: Path, tiny_checkpoint) -> None:
    base = tiny_checkpoint()
    for name in ("a", "b"):
        plain_adapter(tmp_path / name, factors())
        (tmp_path / name / "minillama.json").write_text(json.dumps({"template": name}))
    merge_lora(base, [tmp_path / "a", tmp_path / "b"], Output(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "minillama.json").read_text())["template"] == "b"
