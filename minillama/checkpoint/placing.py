"""Puts a model on the devices of its process: all of it on one, or its layers on several."""

from collections.abc import Sequence

import torch

from minillama.checkpoint.hf_reader import DeviceOf, on_host
from minillama.comm import Mesh
from minillama.llama_config import LlamaConfig
from minillama.model import Llama
from minillama.parallel.shards import is_on_stage


def loading_plan(config: LlamaConfig, devices: Sequence[torch.device]) -> DeviceOf:
    """Where each parameter is loaded to: the host, or the one of several devices that keeps it."""
    if len(devices) == 1:
        return on_host
    from minillama.parallel.placement import plan

    return plan(devices, config.n_layers, config.tie_embeddings).device_of


def stage_plan(config: LlamaConfig, stages: Mesh) -> DeviceOf:
    """Where a pipeline stage loads each parameter: the host, or nowhere if others have it.

    A parameter on the meta device has no memory. `parallel.pipeline` removes it.
    """

    def device_of(name: str) -> torch.device:
        is_own = is_on_stage(name, config.n_layers, stages.size, stages.rank, config.tie_embeddings)
        return torch.device("cpu" if is_own else "meta")

    return device_of


def put_on(model: Llama, devices: Sequence[torch.device]) -> Llama:
    """Move a finished model to its devices."""
    if len(devices) == 1:
        return model.to(devices[0])
    from minillama.parallel.placement import place

    place(model, devices)
    return model
