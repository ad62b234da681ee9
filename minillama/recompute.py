"""Activation recomputation: keep each layer's input, forget the rest, and compute it again in backward.

A layer's activations are many times the size of its input. Recomputing them costs one more forward, about a third of a step's time,
and leaves one (T, C) tensor a layer (Chen et al. 2016). The gradients are the same numbers to the bit.
"""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_activations(layers: nn.ModuleList) -> None:
    """Make every layer of a finished model recompute its activations; its parameters keep their names."""
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
