"""`python -m tests.vendor.run_placement FOLDER`: one model over a fake NPU and the CPU.

A tensor of the NPU and one of the CPU in the same operation are an error, so whatever is not moved
is found. Autograd knows only one device of a fake kind, hence the CPU as the other one. The results
are FOLDER/result.json. This is a process of its own, because autograd must see the fake NPU before
its first backward pass.
"""

import contextlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from minillama.checkpoint.hf_reader import load_model
from minillama.comm import Mesh
from minillama.generation.beam import BeamOptions, beam_search
from minillama.generation.cache import Cache
from minillama.generation.decode import Completion, decode
from minillama.generation.loading import load_with_adapters
from minillama.generation.sampling import Sampling
from minillama.lora import LoraConfig, add_lora
from minillama.model import Llama
from minillama.ops import Documents
from minillama.parallel.placement import place, plan
from minillama.training.model_building import recompute_activations
from minillama.training.trainer import train
from tests.conftest import random_model, random_tokens
from tests.runs import Interruption, interrupt_after, losses_of, small_run
from tests.vendor import fake_device

ORDERS = ("cpu,npu:0", "npu:0,cpu", "cpu,npu:0,cpu")
PROMPTS = ([1, 5, 9, 30], [7], [2, 2, 8], [7])


class Case(NamedTuple):
    """A model to train; `order` names its devices, "" is the CPU alone."""

    order: str
    is_tied: bool
    recomputes: bool
    has_lora: bool


CASES = [Case(*values) for values in itertools.product(ORDERS, *[(False, True)] * 3)]


def devices_in(order: str) -> list[torch.device]:
    return [torch.device(name) for name in order.split(",")]


def loss_and_gradients(case: Case) -> dict[str, list]:
    """By name. Every parameter lies where the plan says, and its gradient too."""
    model = random_model(n_layers=3, tie_embeddings=case.is_tied)
    if case.has_lora:
        config = LoraConfig(rank=2, targets=("q_proj", "down_proj", "lm_head"))
        add_lora(model, config, torch.Generator().manual_seed(1))
    if case.recomputes:
        recompute_activations(model.model.layers)
    if case.order:
        devices = devices_in(case.order)
        place(model, devices)
        places = plan(devices, 3, case.is_tied)
        for name, parameter in model.named_parameters():
            assert parameter.device == places.device_of(name), name
    tokens = random_tokens(1, 24)
    loss = model.loss_sum(tokens, tokens.roll(-1, 1), Documents([10, 3, 11]))
    loss.backward()
    values = {"loss": loss.detach().cpu().tolist()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.device == parameter.device, name
            values[name] = parameter.grad.cpu().tolist()
    return values


def complete(model: Llama) -> list[list[int]]:
    """Greedily, in a batch that shrinks; then with beams."""
    completions = [Completion(prompt, 4 + i) for i, prompt in enumerate(PROMPTS)]
    for _ in decode(model, completions, Sampling(temperature=0, repetition_penalty=1.1)):
        pass
    beams = [Completion([1, 5, 9], 6)]
    list(beam_search(model, beams, BeamOptions(3), Sampling()))
    return [completion.ids for completion in completions + beams]


def place_and_complete(order: str, is_tied: bool) -> list[list[int]]:
    """Tokens; the cache of each layer lies where the layer does."""
    model = random_model(n_layers=3, tie_embeddings=is_tied)
    place(model, devices_in(order))
    cache = Cache.for_model(model, model.config, 1, 4)
    layers = [layer.mlp.up_proj.weight.device for layer in model.model.layers]
    assert [stored.device for stored in cache.keys] == layers
    assert [stored.device for stored in cache.values] == layers
    assert {device.type for device in layers} == {"cpu", "npu"}
    return complete(model)


def devices_after_loading(directory: Path) -> dict[str, str]:
    """Where `load_model` puts each parameter, before the model is placed."""
    places = plan(devices_in("npu:0,cpu"), 2, is_tied=False)
    model = load_model(directory, device_of=places.device_of)
    return {name: str(parameter.device) for name, parameter in model.named_parameters()}


SCRATCH = {"ckpt": "", "init": "scratch", "dim": 24, "n_heads": 6, "n_kv_heads": 3, "ffn_dim": 42}


def train_on(order: str, folder: Path, scratch: bool) -> list[float]:
    """The losses of a short run on these devices."""
    devices = tuple(devices_in(order))
    out_dir = folder / f"run-{order}-{scratch}"
    keys: dict[str, Any] = {}
    if scratch:
        keys = SCRATCH | {"tokenizer": str(folder / "inputs/tokenizer.model"), "n_layers": 2}
    config = small_run(folder / "inputs", out_dir, **keys)
    train(config, Mesh(device=devices[0], devices=devices))
    return losses_of(out_dir)


def continue_elsewhere(folder: Path) -> list[float]:
    """The losses of a run that begins on two devices and goes on with their parts exchanged."""
    out_dir = folder / "moved"
    config = small_run(folder / "inputs", out_dir, save_strategy="steps", save_steps=3)
    begun, continued = (tuple(devices_in(order)) for order in ORDERS[:2])
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Interruption):
        interrupt_after(3, patch)
        train(config, Mesh(device=begun[0], devices=begun))
    assert len(losses_of(out_dir)) == 3
    train(config, Mesh(device=continued[0], devices=continued))
    return losses_of(out_dir)


def main(folder: Path) -> None:
    """folder: has a model in base/, an adapter of it in adapter/, and the inputs of a run."""
    torch.set_num_threads(1)
    fake_device.install("npu")
    opened = load_with_adapters(folder / "adapter", "", [], "float32", devices_in("npu:0,cpu"))
    result = {
        "trained": [loss_and_gradients(case) for case in CASES],
        "completed": {
            f"{order} {is_tied}": place_and_complete(order, is_tied)
            for order, is_tied in itertools.product(ORDERS, (False, True))
        },
        "runs": {
            f"{order} {scratch}": train_on(order, folder, scratch)
            for order, scratch in itertools.product(ORDERS[:2], (False, True))
        },
        "moved": continue_elsewhere(folder),
        "loaded": devices_after_loading(folder / "base"),
        "opened": complete(opened.model),
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
