"""Does a merged checkpoint compute what its base computes with the adapters beside it?

    merged      the files that were written, read again, with their own config
    unmerged    the base's W; for each adapter, in order: a whole tensor replaces W, and factors add
                s·B(A x) to the product with it

Both read the same random tokens. So a merge that is right tensor by tensor and wrong as a model is
noticed, for example if one of two tied weights has changed and the other should not.

Neither model is loaded: a layer reads its weight when it is applied and then forgets it. Memory
holds one weight in fp32, whatever the size of the model.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillama.checkpoint.hf_reader import EMBEDDING, HEAD, open_weights
from minillama.conversion.meta_reader import read_meta
from minillama.conversion.writer import LazyTensors
from minillama.errors import UserError
from minillama.hf_config import read_config
from minillama.llama_config import LlamaConfig
from minillama.model import Llama, RMSNorm
from minillama.peft_adapters import Adapter, LoraFactors

NUM_TOKENS = 8
SMALLEST_LIMIT = 1e-3  # of the relative difference; sums in another order stay far below
ROUNDINGS = 16  # of the output's dtype that the difference may come to

Factors = Mapping[str, list[LoraFactors]]  # by the name of the weight


@dataclass(frozen=True)
class ModelOnDisk:
    """A model whose weights stay in their files."""

    config: LlamaConfig
    tensors: LazyTensors
    factors: Factors = field(default_factory=dict)
    device: torch.device | str = "cpu"

    def read(self, name: str) -> Tensor:
        return self.tensors[name].read().to(self.device).float()


class LinearOnDisk(nn.Module):
    """x W^T + s (x A^T) B^T + bias, in fp32."""

    def __init__(self, model: ModelOnDisk, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.model.read(f"{self.name}.weight"))
        for factors in self.model.factors.get(f"{self.name}.weight", []):
            a = factors.a.read().to(x)  # (R, in)
            b = factors.b.read().to(x)  # (out, R)
            y += factors.scale * F.linear(F.linear(x, a), b)
        bias = f"{self.name}.bias"
        return y + self.model.read(bias) if bias in self.model.tensors else y


class EmbeddingOnDisk(nn.Module):
    """Rows of W + s B A, in fp32."""

    def __init__(self, model: ModelOnDisk) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.model.read(EMBEDDING))
        for factors in self.model.factors.get(EMBEDDING, []):
            a = factors.a.read().to(x)  # (R, C)
            b = factors.b.read().to(x)  # (V, R)
            x += factors.scale * F.embedding(tokens, b) @ a
        return x


def with_adapters(
    config: LlamaConfig,
    tensors: LazyTensors,
    adapters: Iterable[Adapter],
    device: torch.device | str = "cpu",
) -> ModelOnDisk:
    """A base with adapters beside it. A tied head is a weight of its own here."""
    weights = dict(tensors)
    if config.tie_embeddings:
        weights[HEAD] = weights[EMBEDDING]
    factors: dict[str, list[LoraFactors]] = defaultdict(list)
    for adapter in adapters:
        for name, tensor in adapter.whole.items():
            if adapter.is_copy(name) and tensor.equals(weights[name]):
                continue
            weights[name] = tensor
            factors.pop(name, None)
        for entry in adapter.factors:
            factors[entry.weight_name].append(entry)
    vocab_size = weights[EMBEDDING].shape[0]
    config = replace(config, tie_embeddings=False, vocab_size=vocab_size)
    return ModelOnDisk(config, weights, factors, device)


def open_written(directory: Path, meta: bool, device: torch.device | str = "cpu") -> ModelOnDisk:
    """A checkpoint that was written. meta: in Meta's layout."""
    if meta:
        checkpoint = read_meta(directory)
        return ModelOnDisk(checkpoint.config, checkpoint.tensors, device=device)
    config = read_config(directory)
    tensors: LazyTensors = open_weights(directory)
    if config.tie_embeddings:
        tensors = {**tensors, HEAD: tensors[EMBEDDING]}
    return ModelOnDisk(config, tensors, device=device)


@torch.no_grad()
def logits(model: ModelOnDisk, tokens: Tensor) -> Tensor:
    """Logits (1, T, V) of `tokens` (1, T), in fp32."""
    with torch.device("meta"):
        llama = Llama(replace(model.config, tie_embeddings=False))
    for name, module in list(llama.named_modules()):
        if isinstance(module, nn.Linear):
            llama.set_submodule(name, LinearOnDisk(model, name))
        elif isinstance(module, nn.Embedding):
            llama.set_submodule(name, EmbeddingOnDisk(model))
        elif isinstance(module, RMSNorm):
            module.weight = nn.Parameter(model.read(f"{name}.weight"))
    return llama.logits(llama(tokens.to(model.device)))


def compare(merged: ModelOnDisk, unmerged: ModelOnDisk, dtype: torch.dtype, seed: int) -> float:
    """Return the largest difference of the logits, relative to the largest logit.

    dtype: of the merged weights. Raises UserError if the difference is no rounding.
    """
    vocab_size = unmerged.config.vocab_size
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (1, NUM_TOKENS), generator=generator)
    tokens[0, -1] = vocab_size - 1
    expected = logits(unmerged, tokens)
    difference = (logits(merged, tokens) - expected).abs().max() / expected.abs().max()
    limit = max(SMALLEST_LIMIT, ROUNDINGS * torch.finfo(dtype).eps)
    if not difference <= limit:
        raise UserError(
            f"the merged model differs from the base with its adapters by {difference:.1e} of the "
            f"largest logit, more than {limit:.1e}; if --dtype float32 differs too, report it"
        )
    return float(difference)
