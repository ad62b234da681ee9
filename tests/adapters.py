"""Adapters in mid-training, for the tests of LoRA."""

import torch

from minillama.lora import (
    LoraConfig,
    add_lora,
)
from minillama.model import Llama
from tests.conftest import random_tokens

TOKENS = random_tokens(2, 20)


def with_random_adapter(model: Llama, config: LoraConfig) -> Llama:
    """An adapter in mid-training: B is no longer zero, and what is trained whole has moved."""
    add_lora(model, config, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.endswith("lora_A"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


def logits(model: Llama) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(TOKENS))
