"""Presets: each resolves, says how to start it, and can be planned without allocating anything."""

import dataclasses
import math
import re
import resource
from pathlib import Path
from typing import NamedTuple

import pytest

import train
from minillama import presets
from minillama.errors import UserError
from minillama.files import write_json
from minillama.training.architecture import model_config
from minillama.training.dry_run import (
    describe,
    needs_of,
    planned_model,
    refuse_what_cannot_fit,
)
from minillama.training.estimate import estimate

ROOT = Path(__file__).parents[1]
PRESETS = sorted(path.stem for path in (ROOT / "minillama/configs").glob("*.toml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_resolves_and_its_saved_form_replays(preset: str, tmp_path: Path) -> None:
    settings = presets.resolve(preset, {"seed": 7})
    write_json(tmp_path / "train_config.json", dataclasses.asdict(settings))
    assert presets.resolve(str(tmp_path / "train_config.json"), {}) == settings


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
    text = describe(presets.resolve(preset, {}), world_size=8)
    assert f"trained: {trainable:,}" in text
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    )  # KiB; the models are 13 to 26 GB


class Launch(NamedTuple):
    """What the first two comments of a preset say."""

    description: str
    ranks: int
    words: list[str]  # after train.py


def launch_of(preset: str) -> Launch:
    text = (ROOT / f"minillama/configs/{preset}.toml").read_text()
    description, command = (line.removeprefix("# ") for line in text.splitlines()[:2])
    launcher, _, rest = command.partition("train.py")
    counts = re.findall(r"--(?:nnodes|nproc_per_node) (\d+)", launcher)
    return Launch(description, math.prod(map(int, counts)), rest.split())


@pytest.mark.parametrize("preset", PRESETS)
def test_the_command_of_a_preset_gives_the_global_batch_that_it_states(preset: str) -> None:
    """micro-batch × accumulation × data ranks; all ranks form whole models."""
    launch = launch_of(preset)
    settings, _ = train.parse(launch.words)
    ranks_of_model = settings.tensor_parallel * settings.pipeline_parallel
    assert launch.ranks % ranks_of_model == 0
    rows_per_rank = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    rows = rows_per_rank * launch.ranks // ranks_of_model
    assert re.search(r"global batch (\d+)", launch.description)[1] == str(rows)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "demo_lora"])
def test_every_preset_fits_as_it_is_started(preset: str) -> None:
    """demo_lora starts from the checkpoint that demo makes."""
    launch = launch_of(preset)
    settings, _ = train.parse(launch.words)
    settings = dataclasses.replace(settings, ckpt="", init="scratch")
    llama, _ = planned_model(settings)
    assert f"{llama.parameter_count():,}" in describe(settings, launch.ranks)
    refuse_what_cannot_fit(llama, settings)


# Bytes that a device of the documents' machines has.
MEMORY = {"chinese_13b_": 24e9, "full": 16e9, "lora_qv": 16e9}


@pytest.mark.parametrize(
    "preset", ["13b_full", "7b_full", "13b_lora_qv", "7b_lora_qv", "chinese_13b_sft_lora"]
)
def test_the_largest_part_of_a_model_fits_a_chip_of_the_documents(preset: str) -> None:
    """Sophgo's SC7 has 16 GB a chip, Cambricon's X8 24 GB."""
    launch = launch_of(preset)
    settings, _ = train.parse(launch.words)
    settings = dataclasses.replace(settings, ckpt="", init="scratch")
    needs = needs_of(model_config(settings, None), settings, launch.ranks)
    limit = next(size for name, size in MEMORY.items() if name in preset)
    assert max(need.total for need in needs) < limit


def test_the_bytes_of_a_plan_by_hand() -> None:
    """LLaMA-7B on 8 ranks in 16 bits.

    Full training, bytes per parameter: weight 2, gradient 4, master weight and moments 12, which
    ZeRO-1 shards. LoRA: frozen weight 2; per parameter of the adapters 4 + 4 + 8.
    """
    P = 6_738_415_616
    settings = presets.resolve("7b_full_zero1", {})
    full = estimate(model_config(settings, None), settings, 8)
    assert (full.weights, full.gradients, full.optimizer) == (2 * P, 4 * P, 12 * P // 8)
    settings = presets.resolve("7b_lora", {})
    lora = estimate(model_config(settings, None), settings, 8)
    assert (lora.weights, lora.gradients, lora.optimizer) == (
        2 * P + 4 * lora.trainable,
        4 * lora.trainable,
        8 * lora.trainable,
    )


@pytest.mark.parametrize("preset", ["34b_lora", "70b_lora"])
def test_models_that_every_rank_would_hold_whole_are_refused_with_the_bytes(preset: str) -> None:
    flags = {"tensor_parallel": 1, "init": "scratch"}
    settings = presets.resolve(preset, flags)
    llama = model_config(settings, None)
    weights = estimate(llama, settings).weights
    with pytest.raises(UserError, match=f"{weights:,} bytes .* use --tensor_parallel"):
        refuse_what_cannot_fit(llama, settings)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_begins_with_what_it_is_and_how_to_start_it(preset: str) -> None:
    launch = launch_of(preset)
    assert "train.py" not in launch.description
    assert preset in launch.words or preset == "demo"
    train.parse(launch.words)  # its flags exist


@pytest.mark.parametrize("preset", PRESETS)
def test_the_page_of_presets_has_their_grid_and_global_batch(preset: str) -> None:
    launch = launch_of(preset)
    settings, _ = train.parse(launch.words)
    data_ranks = launch.ranks // (settings.tensor_parallel * settings.pipeline_parallel)
    sizes = {
        "data": data_ranks,
        "stages": settings.pipeline_parallel,
        "tensor": settings.tensor_parallel,
    }
    lines = [f"{size} {name}" for name, size in sizes.items() if size > 1 or name == "data"]
    grid = " × ".join(lines)
    if settings.devices:
        grid = f"{settings.devices} devices in one process"
    rows = settings.per_device_train_batch_size
    accumulation = settings.gradient_accumulation_steps
    product = f"{rows} × {accumulation} × {data_ranks} = {rows * accumulation * data_ranks}"
    row = f"| `{preset}` | {grid} | {settings.zero_stage or ''} | {product} |"
    assert row in (ROOT / "docs/presets.md").read_text(encoding="utf-8")
