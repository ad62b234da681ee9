"""Recipes in YAML: the part of it that is translated means what a YAML parser says."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from minillama.errors import UserError
from minillama.yaml_recipes import read_flat_yaml

yaml = pytest.importorskip("yaml")

RECIPE = """\
### model
model_name_or_path: meta-llama/Llama-2-7b-hf
trust_remote_code: true

### method
stage: sft  # supervised
lora_rank: 8
lora_target: q_proj,v_proj

### dataset
dataset: [identity, alpaca_en_demo]
template: "llama3"
cutoff_len: 2048
learning_rate: 1.0e-4
resume_from_checkpoint: null
"""
SCALARS = """
true False yes off 12 -3 0.5 1.0e-4 1e-4 a a/b q_proj,v null ~ "a b" [a] é 1_000 0x10 010 1:30 &a *a
| > [a 2020 .5 1. +4 a#b 'it''s' 12: @a %a - ? none -a ==1 2020-01-01 .inf .nan Null = <<
""".split()
PHRASES = ["", "'x: y'", "[a, b]", "[1, 2]", "a b # c", "# c", "- a", "{a: 1}", "!x y", "a: b"]
scalars = st.sampled_from([*SCALARS, *PHRASES])
lines = st.lists(st.tuples(st.sampled_from(["a", "b", "c_d", "e-f"]), scalars), max_size=4)


@given(lines=lines)
@settings(max_examples=500, deadline=None)
def test_what_is_understood_is_what_a_yaml_parser_reads(lines: list[tuple[str, str]]) -> None:
    text = "".join(f"{key}: {value}\n" for key, value in lines)
    values = read_flat_yaml(text)
    if values is None:
        return
    expected: dict[str, Any] = yaml.safe_load(text) or {}  # an error would fail the test too
    for key, value in expected.items():
        if value == "1e-4":
            expected[key] = 1e-4  # a text in YAML 1.1, which programs take for a number
    assert values == {key: value for key, value in expected.items() if value is not None}


@pytest.mark.parametrize(
    "text", ["a:\n  b: 1", "- a", "a: |\n  b", "a: 1\na: 2", "a: &x 1", "a: {b: 1}", "a 1", "a:1"]
)
def test_what_is_not_flat_is_not_translated(text: str, tmp_path: Path) -> None:
    assert read_flat_yaml(text) is None
    (tmp_path / "a.yml").write_text(text)
    with pytest.raises(UserError, match=r"a\.yml: YAML is not read; write it as TOML, a `key = va"):
        train.parse(["--config", str(tmp_path / "a.yml")])


def test_a_recipe_is_answered_with_the_toml_to_write(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    with pytest.raises(UserError) as refused:
        train.parse(["--config", str(path)])
    head, *toml, flags = str(refused.value).split("\n")
    assert head == (
        f"{path}: YAML is not read; write this into {tmp_path / 'recipe.toml'}, and give that:"
    )
    assert tomllib.loads("\n".join(toml)) == {
        "ckpt": "meta-llama/Llama-2-7b-hf",
        "lora_rank": 8,
        "lora_targets": "q_proj,v_proj",
        "data": ["identity", "alpaca_en_demo"],
        "template": "llama3",
        "max_length": 2048,
        "learning_rate": 1e-4,
    }
    assert flags == ("these are no keys; give them as flags: --trust_remote_code true --stage sft")
    (tmp_path / "recipe.toml").write_text("\n".join(toml))
    config, _ = train.parse(["--config", str(tmp_path / "recipe.toml"), "--stage", "sft"])
    assert (config.max_length, config.data) == (2048, ("identity", "alpaca_en_demo"))


@pytest.mark.parametrize("words", [["recipe.yaml"], ["train", "recipe.yaml"], ["a/b.toml"]])
def test_a_file_without_config_is_answered_with_the_flag(words: list[str]) -> None:
    with pytest.raises(UserError, match=f"a file of settings is given as --config {words[-1]}"):
        train.parse(words)
