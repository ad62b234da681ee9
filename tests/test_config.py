"""Settings and the command line: what wins, what is refused, and what the scripts say when something is missing."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from minillama import cli, train_config
from minillama.checkpoint.hf_format import write_json
from minillama.errors import UserError
from minillama.train_config import KEYS, TrainConfig
from minillama.training import run
from minillama.training.dry_run import estimate

ROOT = Path(__file__).parents[1]
PRESETS = sorted(path.stem for path in (ROOT / "minillama/configs").glob("*.toml"))


def parse(*flags: str) -> dict:
    parser = cli.Parser()
    cli.add_keys(parser)
    return vars(parser.parse_args(list(flags)))


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_flag_wins_over_the_preset_and_the_preset_over_the_default(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[train]\nlearning_rate = 1e-3\nwarmup_ratio = 0.1\n[lora]\nlora = true\n")
    settings = train_config.resolve(str(recipe), parse("--learning_rate", "5e-4"))
    assert (settings.learning_rate, settings.warmup_ratio, settings.lora) == (5e-4, 0.1, True)
    assert settings.weight_decay == TrainConfig().weight_decay
    assert settings.out_dir == "runs/recipe"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_resolves_and_its_saved_form_replays(preset: str, tmp_path: Path) -> None:
    settings = train_config.resolve(preset, parse("--seed", "7"))
    write_json(tmp_path / "train_config.json", dataclasses.asdict(settings))
    assert train_config.resolve(str(tmp_path / "train_config.json"), {}) == settings


@pytest.mark.parametrize(
    ("preset", "trainable"),
    [
        ("7b_lora", 16 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))),
        ("7b_full_zero1", 6_738_415_616),
        ("13b_full_zero2", 13_015_864_320),
        ("7b_full", 6_738_415_616),
        ("13b_full", 13_015_864_320),
        ("7b_vicuna", 6_738_415_616),
        ("13b_vicuna", 13_015_864_320),
        ("7b_lora_qv", 8 * 32 * 2 * 2 * 4096),
        ("13b_lora_qv", 8 * 40 * 2 * 2 * 5120),
        ("chinese_sft_lora", 64 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008)) + 2 * 55296 * 4096),
    ],
)
def test_a_plan_counts_parameters_exactly_and_allocates_nothing(
    preset: str, trainable: int
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = run.describe(train_config.resolve(preset, {}), world_size=8)
    assert f"trained: {trainable:,}" in text
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    )  # KiB; the models are 13 to 26 GB


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "demo_lora"])
def test_every_preset_can_be_planned(preset: str) -> None:
    """demo_lora starts from the checkpoint that demo makes."""
    settings = train_config.resolve(preset, {})
    assert f"{run.model_config(settings).parameter_count():,}" in run.describe(settings, 1)


def test_the_bytes_of_a_plan_by_hand() -> None:
    """LLaMA-7B, 8 ranks, 16 bits. Full: 2 bytes of weight, 4 of gradient, 12 of master and moments a parameter, of which ZeRO-1
    shards the 12. LoRA: the frozen weights 2, and for each of its own numbers 4 + 4 + 8."""
    P = 6_738_415_616
    full = estimate(
        run.model_config(train_config.resolve("7b_full_zero1", {})),
        train_config.resolve("7b_full_zero1", {}),
        8,
    )
    assert (full.weights, full.gradients, full.optimizer) == (2 * P, 4 * P, 12 * P // 8)
    settings = train_config.resolve("7b_lora", {})
    lora = estimate(run.model_config(settings), settings, 8)
    assert (lora.weights, lora.gradients, lora.optimizer) == (
        2 * P + 4 * lora.trainable,
        4 * lora.trainable,
        8 * lora.trainable,
    )


@pytest.mark.parametrize("preset", ["34b_lora", "70b_lora"])
def test_models_that_every_rank_would_hold_whole_are_refused_with_the_bytes(preset: str) -> None:
    settings = dataclasses.replace(train_config.resolve(preset, {}), ckpt="", init="scratch")
    weights = estimate(run.model_config(settings), settings).weights
    with pytest.raises(UserError, match=f"{weights:,} bytes .* tensor parallelism"):
        run.refuse_what_cannot_fit(settings)


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (["--model_name_or_path", "x"], "ckpt", "x"),
        (["--data_path", "a.json,b.json"], "data", ("a.json", "b.json")),
        (["--output_dir", "o"], "out_dir", "o"),
        (["--model_max_length", "77"], "max_length", 77),
        (["--cutoff_len", "77"], "max_length", 77),
        (["--lora_r", "4"], "lora_rank", 4),
        (["--lora_target", "q_proj,v_proj"], "lora_targets", ("q_proj", "v_proj")),
        (["--evaluation_strategy", "epoch"], "eval_strategy", "epoch"),
        (["--fp16", "True"], "precision", "fp16"),
        (["--bf16"], "precision", "bf16"),
        (["--bf16", "False"], "precision", "fp32"),
        (["--dtype", "bfloat16"], "precision", "bf16"),
        (["--learning-rate", "1"], "learning_rate", 1.0),
        (["--max-grad-norm=0.5"], "max_grad_norm", 0.5),
        (["--gradient_checkpointing"], "gradient_checkpointing", True),
        (["--gradient_checkpointing", "True"], "gradient_checkpointing", True),
        (["--packing", "false"], "packing", False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_lines_of_other_systems_can_be_pasted(
    flags: list[str], key: str, value: object
) -> None:
    assert getattr(train_config.resolve("", parse(*flags)), key) == value


@pytest.mark.parametrize(
    ("flags", "lora"),
    [
        ((), False),
        (("--lora_rank", "4"), True),
        (("--adapter", "a"), True),
        (("--lora_rank", "4", "--lora", "false"), False),
        (("--finetuning_type", "full", "--lora_target", "q_proj"), False),
        (("--config", "7b_full", "--lora_rank", "4"), True),
    ],
    ids=str,
)
def test_a_flag_of_lora_turns_it_on_rather_than_being_ignored(
    flags: tuple[str, ...], lora: bool
) -> None:
    source, flags = (flags[1], flags[2:]) if "--config" in flags else ("", flags)
    assert train_config.resolve(source, parse(*flags)).lora is lora


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--learning_rte", "1"], "did you mean '--learning_rate'"),
        (["--model_name_or_pth", "x"], "did you mean '--model_name_or_path'"),
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
        (["--validation_split", "1"], "validation_split = 1.0"),
        (["--fp16", "--bf16"], "exclude each other"),
        (["--zero_stage", "3"], "zero_stage = 3; choose one of: 0, 1, 2"),
        (["--seed"], "expected one argument"),
        (["--learn", "1"], "unknown argument --learn"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_on_the_command_line_is_named(flags: list[str], named: str) -> None:
    with pytest.raises(UserError) as error:
        train_config.resolve("", parse(*flags))
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
        train_config.resolve(str(tmp_path / "recipe.toml"), {})
    assert named in str(error.value)


def test_an_unknown_preset_names_the_closest() -> None:
    with pytest.raises(UserError, match="no preset or file '7b_lra' \\(did you mean '7b_lora'"):
        train_config.resolve("7b_lra", {})


def test_every_key_has_a_help_and_every_alias_a_key() -> None:
    assert all(field.metadata["help"] for field in KEYS.values())
    assert set(train_config.RENAMED.values()) <= KEYS.keys()
    assert not set(train_config.RENAMED) & KEYS.keys()


def test_the_first_comment_of_a_preset_says_what_it_is_and_how_to_start_it() -> None:
    for name in PRESETS:
        first = (ROOT / f"minillama/configs/{name}.toml").read_text().split("\n", 1)[0]
        assert first.startswith("# ")
        command = first.split(": ", 1)[1]
        assert "train.py" in command
        assert f"--config {name}" in command or name == "demo"
        words = command.split("train.py")[1].split()
        parse(*[word for word in words if word not in ("--config", name)])  # its flags exist


# The scripts


def test_missing_weights_and_data_end_with_the_complete_command() -> None:
    done = script("train.py", "--config", "7b_lora", LOCAL_WORLD_SIZE="8")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert (
        "torchrun --nproc_per_node 8 train.py --config 7b_lora --ckpt LLAMA_DIR --data alpaca_data.json"
        in done.stderr
    )
    assert "huggingface.co/meta-llama" in done.stderr
    assert "github.com/tatsu-lab/stanford_alpaca" in done.stderr


def test_only_what_is_missing_is_asked_for() -> None:
    with pytest.raises(UserError) as error:
        run.check_inputs(TrainConfig(ckpt="llama"), "python train.py --ckpt llama")
    assert "type: python train.py --ckpt llama --data alpaca_data.json" in str(error.value)
    assert "LLAMA_DIR" not in str(error.value)
    run.check_inputs(TrainConfig(ckpt="llama", data=("a.json",)), "")


def test_dry_run_prints_the_plan() -> None:
    done = script("train.py", "--config", "70b_lora", "--dry_run", "--world_size", "8")
    assert done.returncode == 0
    assert "68,976,648,192" in done.stdout


def test_list_configs_prints_a_line_for_each_preset() -> None:
    done = script("train.py", "--list_configs")
    others = [name for name in PRESETS if not name.startswith("demo")]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["demo", "demo_lora", *others]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("train.py", "--epochs", "3"), "unknown argument --epochs"),
        (("generate.py",), "--ckpt DIR is missing"),
        (("generate.py", "--ckpt", "x"), "nothing to answer"),
        (("eval.py", "--task", "dmeo"), "did you mean 'demo'"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(
    arguments: tuple[str, ...], named: str
) -> None:
    done = script(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert named in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_debug_shows_the_traceback() -> None:
    done = script("generate.py", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_a_saved_config_is_plain_json(tmp_path: Path) -> None:
    write_json(tmp_path / "c.json", dataclasses.asdict(TrainConfig()))
    assert json.loads((tmp_path / "c.json").read_text()).keys() == KEYS.keys()
