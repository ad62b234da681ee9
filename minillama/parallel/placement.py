"""One model over several devices of one process: consecutive layers on each.

The problem: a model that fits none of the devices fits all of them together. The idea: each device
holds some layers, and the hidden states move to the next device where the layers do.

    devices 0                     1                      2
            embed, layers 0-10 ─▶ layers 11-21 ─▶ layers 22-31, norm, head

A finished `Llama` is changed from outside. Its parts move to their devices, and a hook before each
part moves what the part is given. Autograd moves gradients back by itself, so training needs
nothing more. A head that is tied to the embedding stays with it on the first device, and the last
norm with the head.

What all layers of a device are given besides the hidden states (rotary tables, documents, the
lengths in the cache) is moved once in a forward pass, and not in each layer. The cache itself does
not move: each layer's keys and values are made on its device (`generation.cache`).

One device computes at a time, so this saves memory and not time. `parallel.tensor` divides the work
too, with a process for each device. Random numbers: dropout on two devices draws from two
generators of the same seed.

Shapes: B batch, T positions, C model width, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minillama.device import make_current
from minillama.device_list import refuse_too_many
from minillama.ops import Documents
from minillama.parallel.shards import layers_of_stage

EMBEDDING = "model.embed_tokens"
LAYERS = "model.layers"
NORM = "model.norm"
HEAD = "lm_head"


@dataclass(frozen=True)
class Plan:
    """Which device holds which part of a model."""

    of_layer: tuple[torch.device, ...]  # by layer
    of_head: torch.device  # and of the last norm

    def device_of(self, name: str) -> torch.device:
        """The device of a module or parameter, by its name in the model."""
        if name.startswith(f"{LAYERS}."):
            layer = int(name.split(".")[2])
            return self.of_layer[layer]
        if name.startswith(EMBEDDING):
            return self.of_layer[0]
        return self.of_head


def plan(devices: Sequence[torch.device], n_layers: int, is_tied: bool) -> Plan:
    """Share out the layers evenly.

    is_tied: whether the head is tied to the embedding.
    Raises UserError if there are more devices than layers.
    """
    refuse_too_many(len(devices), n_layers)
    of_layer: list[torch.device] = []
    for number, device in enumerate(devices):
        layers = layers_of_stage(n_layers, len(devices), number)
        of_layer += [device] * len(layers)
    return Plan(tuple(of_layer), of_head=devices[0] if is_tied else devices[-1])


def place(model: nn.Module, devices: Sequence[torch.device]) -> None:
    """Spread a finished `Llama` over devices; they may repeat.

    Adapters must be in the model already, and recomputation too. Tokens, labels and documents may
    be on any device. Hidden states and logits come out on the device of the head.
    """
    layers = model.get_submodule(LAYERS)
    embedding = model.get_submodule(EMBEDDING)
    head = model.get_submodule(HEAD)
    assert isinstance(layers, nn.ModuleList)
    is_tied = head.weight is embedding.weight
    places = plan(devices, len(layers), is_tied)

    for name in (EMBEDDING, NORM, HEAD):
        part = model.get_submodule(name)
        device = places.device_of(name)
        part.to(device)
        part.register_forward_pre_hook(partial(_move_inputs, device))
    if is_tied:
        head.weight = embedding.weight
    loss_sum: Any = partial(_move_and_call, places.of_head, head.loss_sum)
    head.loss_sum = loss_sum  # no hook sees the call of a method

    shared = {device: SharedInputs(device) for device in devices}
    for layer, device in zip(layers, places.of_layer, strict=True):
        layer.to(device)
        layer.register_forward_pre_hook(shared[device].move)
    forget = partial(_forget_inputs, list(shared.values()))
    model.register_forward_hook(forget, always_call=True)


class CacheOnDevice:
    """What a layer on another device needs of a `model.KeyValueCache`: `append` and `lengths`."""

    def __init__(self, cache: Any, device: torch.device) -> None:
        self.append = cache.append
        self.lengths = None if cache.lengths is None else cache.lengths.to(device)


class SharedInputs:
    """Moves the inputs of the layers on one device: those that all layers share, only once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.forget()

    def forget(self) -> None:
        """Hold nothing after a forward pass, so that a cache can be freed."""
        self.given: tuple[Any, ...] = ()  # cos, sin, documents, cache
        self.moved: tuple[Any, ...] = ()

    def move(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The hook: (x, cos, sin, documents, cache), all on the layer's device."""
        x, *given = inputs
        make_current(self.device)
        if not self._are_moved(given):
            self.given = tuple(given)
            self.moved = tuple(_on_device(value, self.device) for value in given)
        return (x.to(self.device), *self.moved)

    def _are_moved(self, given: list[Any]) -> bool:
        if len(given) != len(self.given):
            return False
        pairs = zip(given, self.given, strict=True)
        return all(new is old for new, old in pairs)


def _on_device(value: Any, device: torch.device) -> Any:
    """One of the inputs that the layers of a device share, on that device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Documents):
        return value if value.device == device else Documents(value.lengths, device)
    return None if value is None else CacheOnDevice(value, device)


def _move_inputs(
    device: torch.device, part: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The hook before the embedding, the norm and the head."""
    make_current(device)
    return tuple(x.to(device) for x in inputs)


def _move_and_call(device: torch.device, function: Any, *inputs: Any) -> Any:
    """Call a method of a part with its inputs on the part's device."""
    make_current(device)
    moved = [x.to(device) if isinstance(x, Tensor) else x for x in inputs]
    return function(*moved)


def _forget_inputs(
    shared: list[SharedInputs], model: nn.Module, inputs: tuple[Any, ...], output: Any
) -> None:
    """The hook after a forward pass of the whole model."""
    for inputs_of_device in shared:
        inputs_of_device.forget()
