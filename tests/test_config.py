"""The settings of a run: which of default, file and flag wins, and which mistakes are named."""

import dataclasses
import json
from pathlib import Path

import pytest

from minillama import cli, presets
from minillama.errors import UserError
from minillama.files import write_json
from minillama.train_config import KEYS, TrainConfig


def parse(*flags: str) -> dict:
    parser = cli.Parser()
    cli.add_keys(parser)
    return vars(parser.parse_args(list(flags)))


def test_a_flag_wins_over_the_preset_and_the_preset_over_the_default(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[train]\nlearning_rate = 1e-3\nwarmup_ratio = 0.1\n[lora]\nlora = true\n")
    settings = presets.resolve(str(recipe), parse("--learning_rate", "5e-4"))
    assert (settings.learning_rate, settings.warmup_ratio, settings.lora) == (5e-4, 0.1, True)
    assert settings.weight_decay == TrainConfig().weight_decay
    assert settings.out_dir == "runs/recipe"


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (["--data", "a.json,b.json"], "data", ("a.json", "b.json")),
        (["--fp16", "True"], "precision", "fp16"),
        (["--bf16"], "precision", "bf16"),
        (["--bf16", "False"], "precision", "fp32"),
        (["--learning-rate", "1"], "learning_rate", 1.0),
        (["--max-grad-norm=0.5"], "max_grad_norm", 0.5),
        (["--gradient_checkpointing"], "gradient_checkpointing", True),
        (["--gradient_checkpointing", "True"], "gradient_checkpointing", True),
        (["--packing", "false"], "packing", False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_may_be_typed_in_every_usual_way(flags: list[str], key: str, value: object) -> None:
    assert getattr(presets.resolve("", parse(*flags)), key) == value


@pytest.mark.parametrize(
    ("flags", "lora"),
    [
        ((), False),
        (("--lora_rank", "4"), True),
        (("--adapter", "a"), True),
        (("--lora_rank", "4", "--lora", "false"), False),
        (("--config", "7b_full", "--lora_rank", "4"), True),
    ],
    ids=str,
)
def test_a_flag_of_lora_turns_it_on_rather_than_being_ignored(
    flags: tuple[str, ...], lora: bool
) -> None:
    source, flags = (flags[1], flags[2:]) if "--config" in flags else ("", flags)
    assert presets.resolve(source, parse(*flags)).lora is lora


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--learning_rte", "1"], "did you mean '--learning_rate'"),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--packing", "perhaps"], "'perhaps' is not true or false"),
        (["--lr_scheduler_type", "cosin"], "did you mean 'cosine'"),
        (["--num_train_epochs", "0"], "num_train_epochs = 0.0: must be at least 0.001"),
        (["--max_steps", "-3"], "max_steps = -3: must not be negative"),
        (["--save_steps", "0"], "save_steps = 0: must be at least 1"),
        (["--learning_rate", "nan"], "learning_rate = nan: must not be negative, and be finite"),
        (["--seed", str(2**63)], "and be finite"),
        (["--lora_dropout", "1"], "and be below 1"),
        (["--warmup_ratio", "3"], "and be below 1"),
        (["--adam_beta2", "1"], "and be below 1"),
        (["--threads", "100000"], "and be below 1025"),
        (["--initial_scale_power", "5000"], "and be below 128"),
        (["--validation_split", "100"], "be below 1; it is: fraction of the training documents"),
        (["--fp16", "--bf16"], "exclude each other"),
        (["--zero_stage", "3"], "zero_stage = 3; choose one of: 0, 1, 2"),
        (["--seed"], "expected one argument"),
        (["--learn", "1"], "unknown argument --learn"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_on_the_command_line_is_named(flags: list[str], named: str) -> None:
    with pytest.raises(UserError) as error:
        presets.resolve("", parse(*flags))
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            "[train]\nlearnin_rate = 1.0",
            "[train] learnin_rate: unknown key (did you mean 'learning_rate'?)",
        ),
        ("[train]\nlora_rank = 4", "belongs to section [lora]"),
        ("[train]\nlearning_rate = '1'", "learning_rate = '1': expected float, found str"),
        ("[train]\nmax_steps = 1.5", "expected int, found float"),
        ("[train]\nmax_steps = true", "expected int, found bool"),
        ("[lora]\nlora = 1", "expected bool, found int"),
        ("[lora]\nlora_targets = [1]", "expected tuple, found list"),
        ("[train\n", "recipe.toml: "),
        ("[train]\nprecision = 'fp8'", "precision = 'fp8'"),
    ],
    ids=str,
)
def test_a_mistake_in_a_file_is_named(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(UserError) as error:
        presets.resolve(str(tmp_path / "recipe.toml"), {})
    assert named in str(error.value)


def test_an_unknown_preset_names_the_closest() -> None:
    with pytest.raises(UserError, match="no preset or file '7b_lra' \\(did you mean '7b_lora'"):
        presets.resolve("7b_lra", {})


def test_every_key_has_a_help_text() -> None:
    assert all(key.help for key in KEYS.values())


def test_a_saved_config_is_plain_json(tmp_path: Path) -> None:
    write_json(tmp_path / "c.json", dataclasses.asdict(TrainConfig()))
    assert json.loads((tmp_path / "c.json").read_text()).keys() == KEYS.keys()
