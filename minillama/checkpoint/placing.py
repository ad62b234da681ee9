"""Where the parameters of a model are loaded to: one device, several, or nowhere.

One device holds all of a model; several devices of a process hold consecutive layers, and so do the
ranks of a pipeline.
"""

from collections.abc import Sequence
from functools import partial

import torch

from minillama.checkpoint.hf_reader import DeviceOf, on_host
from minillama.comm import Mesh
from minillama.llama_config import LlamaConfig
from minillama.model import Llama
from minillama.parallel.shards import is_on_stage


def loading_plan(
    config: LlamaConfig, devices: Sequence[torch.device], stages: Mesh | None = None
) -> DeviceOf:
    """Where each parameter is loaded to: the host, or the one of several devices that keeps it.

    stages: a line of pipeline stages. What others of them hold is on the meta device, which has no
    memory, until `parallel.pipeline` removes it.
    """
    if stages is not None and stages.size > 1:
        return partial(_host_or_nowhere, config, stages)
    if len(devices) == 1:
        return on_host
    from minillama.parallel.placement import plan

    return plan(devices, config.n_layers, config.tie_embeddings).device_of


def _host_or_nowhere(config: LlamaConfig, stages: Mesh, name: str) -> torch.device:
    is_own = is_on_stage(name, config.n_layers, stages.size, stages.rank, config.tie_embeddings)
    return torch.device("cpu" if is_own else "meta")


def put_on(model: Llama, devices: Sequence[torch.device]) -> Llama:
    """Move a finished model to its devices."""
    if len(devices) == 1:
        return model.to(devices[0])
    from minillama.parallel.placement import place

    place(model, devices)
    return model
