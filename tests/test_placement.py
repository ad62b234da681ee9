"""One model over several devices of one process. Here the CPU stands for each of them.

tests/vendor/test_placement.py has two devices that differ.
"""

import gc
import json
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import generate
import minillama
from minillama import memory
from minillama.comm import Mesh
from minillama.errors import UserError
from minillama.evaluation.options import EvalOptions
from minillama.evaluation.runner import evaluate
from minillama.generation.cache import Cache
from minillama.generation.loading import LoadOptions
from minillama.generation.sampling import Sampling
from minillama.lora import LoraConfig, add_lora
from minillama.memory import Memory
from minillama.model import Llama
from minillama.ops import Documents
from minillama.parallel import placement
from minillama.parallel.placement import place, plan
from minillama.train_config import TrainConfig
from minillama.training.model_building import recompute_activations
from minillama.training.settings import refuse_two_divisions
from minillama.training.trainer import train
from tests.conftest import random_model, random_tokens
from tests.runs import losses_of, weights_of

CPU = torch.device("cpu")
THREE = [torch.device("cuda", number) for number in range(3)]
GREEDY = Sampling(temperature=0)


@pytest.mark.parametrize(
    ("n_layers", "on_each"), [(3, [1, 1, 1]), (7, [3, 2, 2]), (32, [11, 11, 10])]
)
def test_layers_are_shared_out_evenly_and_in_order(n_layers: int, on_each: list[int]) -> None:
    places = plan(THREE, n_layers, is_tied=False)
    of_layer = [places.device_of(f"model.layers.{i}.mlp.up_proj.weight") for i in range(n_layers)]
    assert of_layer == sorted(of_layer, key=lambda device: device.index)
    assert [of_layer.count(device) for device in THREE] == on_each


@pytest.mark.parametrize(("is_tied", "of_head"), [(False, THREE[2]), (True, THREE[0])])
def test_a_tied_head_and_the_norm_before_it_stay_with_the_embedding(
    is_tied: bool, of_head: torch.device
) -> None:
    places = plan(THREE, 3, is_tied)
    assert places.device_of("model.embed_tokens.weight") == THREE[0]
    assert places.device_of("model.norm.weight") == of_head
    assert places.device_of("lm_head.weight") == of_head
    assert places.device_of("lm_head.lora_A") == of_head


def test_more_devices_than_layers_are_refused() -> None:
    with pytest.raises(UserError, match="3 devices, but the model has 2 layers; name at most 2"):
        plan(THREE, 2, is_tied=False)


def loss_and_gradients(model: Llama) -> dict[str, Tensor]:
    tokens = random_tokens(1, 24)
    loss = model.loss_sum(tokens, tokens.roll(-1, 1), Documents([10, 3, 11]))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_loss_and_gradients_are_those_of_one_device(
    tied: bool, recompute: bool, lora: bool
) -> None:
    def model_on(devices: list[torch.device]) -> Llama:
        model = random_model(n_layers=3, tie_embeddings=tied)
        if lora:
            config = LoraConfig(rank=2, targets=("q_proj", "down_proj", "lm_head"))
            add_lora(model, config, torch.Generator().manual_seed(1))
        if recompute:
            recompute_activations(model.model.layers)
        if len(devices) > 1:
            place(model, devices)
        return model

    expected = loss_and_gradients(model_on([CPU]))
    found = loss_and_gradients(model_on([CPU] * 3))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_what_layers_share_is_moved_once_to_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """cos, sin, documents and cache: four of them to the one device, for three layers."""
    moved = []
    on_device = placement._on_device

    def counting(value: object, device: torch.device) -> object:
        moved.append(value)
        return on_device(value, device)

    monkeypatch.setattr(placement, "_on_device", counting)
    model = random_model(n_layers=3)
    place(model, [CPU, CPU])
    for calls in (1, 2):
        model(random_tokens(1, 8), Documents([5, 3]))
        assert len(moved) == 4 * calls


@pytest.mark.parametrize("fails", [False, True], ids=["finished", "failed"])
def test_a_cache_is_freed_when_nobody_uses_it(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a forward pass, failed or not, the hooks hold nothing of it."""
    model = random_model()
    place(model, [CPU, CPU])
    cache = Cache.for_model(model, model.config, 1, 8)
    if fails:
        monkeypatch.setattr(model.model, "norm", None)
    with pytest.raises(TypeError) if fails else nullcontext():
        model(random_tokens(1, 4), cache=cache.extend(4))
    kept = weakref.ref(cache)
    del cache
    gc.collect()
    assert kept() is None


@pytest.fixture
def checkpoint(inputs: Path) -> Path:
    """A model of two layers with a tokenizer."""
    return inputs / "base"


def test_the_memory_of_a_run_is_that_of_the_fullest_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peaks = {THREE[0]: 5, THREE[1]: 9, THREE[2]: None}
    monkeypatch.setattr(memory, "device_memory", lambda device: Memory(peaks[device], None))
    assert memory.peak_bytes(THREE) == 9
    assert memory.peak_bytes(THREE[2:]) is None


def test_a_model_is_divided_among_devices_or_among_ranks() -> None:
    config = TrainConfig(devices="cpu,cpu", pipeline_parallel=2)
    with pytest.raises(UserError, match="devices = cpu,cpu and pipeline_parallel = 2 both divide"):
        refuse_two_divisions(config, Mesh(devices=(CPU, CPU)))


def test_the_python_api_takes_a_list_or_a_string(checkpoint: Path) -> None:
    prompts = ["Which number is larger, 31 or 62?", "Repeat: a b"]
    expected = minillama.load(checkpoint, device="cpu").generate(
        prompts, max_new_tokens=12, greedy=True
    )
    for devices in ("cpu,cpu", ["cpu", "cpu"]):
        model = minillama.load(checkpoint, devices=devices)
        assert model.generate(prompts, max_new_tokens=12, greedy=True) == expected
    with pytest.raises(UserError, match="one cpu"):
        minillama.load(checkpoint, device="cpu", devices=2)


@pytest.mark.parametrize("beams", [[], ["--num_beams", "3"]], ids=["greedy", "beams"])
def test_generate_writes_the_same_on_several_devices(
    beams: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    def completions(name: str, *flags: str) -> list[list[str]]:
        output = tmp_path / name
        words = ["--ckpt", str(checkpoint), "--output", str(output), "--max_new_tokens", "9"]
        prompts = ["--prompt", "Repeat: x y z", "--prompt", "Hello", "--greedy"]
        generate.main([*words, *prompts, *beams, *flags])
        records = [json.loads(line) for line in output.read_text().splitlines()]
        return [record["completion_ids"] for record in records]

    alone = completions("one.jsonl", "--device", "cpu")
    assert completions("two.jsonl", "--devices", "cpu,cpu") == alone


def test_evaluation_scores_the_same_on_several_devices(checkpoint: Path, tmp_path: Path) -> None:
    questions = tmp_path / "dev.jsonl"
    records = [
        {
            "question": f"is {i} larger than 3",
            "passage": f"{i} and 3.",
            "answer": i > 3,
            "title": "",
        }
        for i in range(6)
    ]
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = EvalOptions(task="boolq", data=str(questions))
    load_options = LoadOptions(str(checkpoint))
    alone = evaluate(options, load_options, Mesh())
    spread = evaluate(options, load_options, Mesh(devices=(CPU, CPU)))
    assert [record["scores"] for record in spread.predictions] == [
        record["scores"] for record in alone.predictions
    ]


def test_training_on_several_devices_ends_at_the_same_bytes(
    settings_for: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    alone = settings_for(out_dir=str(tmp_path / "one"))
    spread = replace(alone, devices="cpu,cpu", device="auto", out_dir=str(tmp_path / "two"))
    train(alone)
    train(spread)
    assert losses_of(spread.out_dir) == losses_of(alone.out_dir)
    expected = weights_of(tmp_path / "one/final")
    for name, value in weights_of(tmp_path / "two/final").items():
        assert torch.equal(value, expected[name]), name
