"""The weights that an adapter brings whole: an embedding and a head, or copies of other modules.

PEFT saves them beside the factors if they are trained whole, and sometimes copies of what was not
trained. A copy that is equal to the model's own is left out here. An embedding and a head that were
tied stay so if the adapter's are equal.

Ranks may have parts of the model: those of a tensor line parts of each weight, those of a stage
line some of the weights. All of them decide alike.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from minillama import comm
from minillama.adapter_checks import EMBEDDING, HEAD, whole_shapes
from minillama.comm import Mesh
from minillama.lora_layers import ADAPTED
from minillama.model import Llama
from minillama.parallel.shards import axis_of
from minillama.parallel.tensor import set_sizes
from minillama.parallel.whole import read_part
from minillama.peft_adapters import Adapter
from minillama.peft_config import LoraConfig
from minillama.tensor_files import TensorRef

# What modules_to_save may name, and where it is in the model.
WHOLE = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}


def changed_tensors(model: Llama, adapter: Adapter, lines: Sequence[Mesh]) -> dict[str, TensorRef]:
    """The whole tensors of an adapter, without copies that are equal to the model's."""
    shapes = whole_shapes(model)
    whole = {}
    for name, tensor in adapter.whole.items():
        is_changed = True
        if adapter.is_copy(name) and tensor.shape == shapes[name]:
            parameter = model.get_parameter(name)
            part = read_part(tensor, axis_of(name), lines[0])
            is_changed = _differ_anywhere(part, parameter, lines)
        if is_changed:
            whole[name] = tensor
    return whole


def with_modules(adapter: Adapter, whole: dict[str, TensorRef]) -> LoraConfig:
    """An adapter's configuration, with its whole modules under the names they are saved by."""
    short_names = {module: name for name, module in WHOLE.items()}
    saved: dict[str, None] = {}
    copied: dict[str, None] = {}
    for name in whole:
        module = name.rpartition(".")[0]
        modules = copied if adapter.is_copy(name) else saved
        modules[short_names.get(module, module)] = None
    in_order = [name for name in adapter.config.modules_to_save if name in saved]
    in_order += [name for name in saved if name not in in_order]
    return replace(adapter.config, modules_to_save=tuple(in_order), modules_to_copy=tuple(copied))


def load_whole(model: Llama, whole: dict[str, TensorRef], lines: Sequence[Mesh]) -> None:
    """Replace parameters, and what earlier adapters added to them."""
    was_tied = is_tied(model)
    vocab_size = model.config.vocab_size
    for name, tensor in whole.items():
        if name == EMBEDDING:
            vocab_size = tensor.shape[0]
        module_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_name)
        if module.get_parameter(attribute).is_meta:
            continue
        if isinstance(module, ADAPTED):
            module = module.plain(module.weight)
            model.set_submodule(module_name, module)
        part = read_part(tensor, axis_of(name), lines[0])
        setattr(module, attribute, nn.Parameter(part.to(module.get_parameter(attribute))))
        set_sizes(module)
    embedding = model.get_parameter(EMBEDDING)
    stays_tied = was_tied and not _differ_anywhere(embedding, model.lm_head.weight, lines)
    if stays_tied:
        model.lm_head.weight = embedding
    model.config = replace(model.config, vocab_size=vocab_size, tie_embeddings=stays_tied)


def _differ_anywhere(a: Tensor, b: Tensor, lines: Sequence[Mesh]) -> bool:
    """Whether two tensors, or the parts of them on any rank of these lines, differ.

    Those on the meta device have no values; another rank compares them.
    """
    differ = not b.is_meta and not torch.equal(a.to(b), b)
    for line in lines:
        differ = comm.any_rank(line, differ)
    return differ


def is_tied(model: nn.Module) -> bool:
    return model.get_parameter(HEAD) is model.get_parameter(EMBEDDING)
