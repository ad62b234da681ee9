"""Weight-only int8: a linear layer whose weight takes one byte an element.

Decoding one sequence reads every weight once for each token, and does little else. So its speed is
that of the memory, and weights of a quarter of the bytes of fp32 are read in a quarter of the time.

    s_i  = max_j |W_ij| / 127       a scale for each output channel i, in bf16
    Q_ij = round(W_ij / s_i)        int8
    y_i  = s_i * sum_j Q_ij x_j     x and y in bf16

The embedding, of which a token reads one row, and the norms stay in bf16. A tied head becomes an
int8 copy of the embedding. An int8 model is for inference: it has no gradients and is not saved.

`quantize_linear` is called for each tensor as it is loaded, so the memory holds the int8 model and
one 16-bit tensor. docs/int8.md has what the rounding costs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillama import ops
from minillama.memory import release_freed
from minillama.model import Linear, Llama

LEVELS = 127  # int8 without -128, so that the range is symmetric
KERNEL_ROWS = 32  # from more rows on, a product with dequantized weights is faster
KERNEL_WIDTH = 32  # torch's kernel reads past a row whose length is no multiple of 16
BLOCK = 1 << 20  # elements dequantized at a time, so that they stay in the CPU's cache


class Int8Linear(nn.Module):
    """x W^T + b with W (out, in) in int8. x is bf16, (..., in)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.detach().float()
        largest = weight.abs().amax(dim=1)  # (out,)
        scales = (largest / LEVELS).bfloat16()
        divisors = scales.float().where(scales != 0, 1.0)  # a channel of zeros has scale 0
        quotients = (weight / divisors.unsqueeze(1)).round()  # (out, in)
        quantized = quotients.clamp(-LEVELS, LEVELS).to(torch.int8)
        self.weight = nn.Parameter(quantized, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)  # NaN if the weight holds NaN
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (rows, in)
        if len(rows) <= KERNEL_ROWS and _kernel_takes(self.weight):
            y = torch._weight_int8pack_mm(rows, self.weight, self.scales)
        else:
            y = self._multiply_in_blocks(rows)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], -1)

    def _multiply_in_blocks(self, rows: Tensor) -> Tensor:
        """The product (rows, out), with some output channels dequantized at a time."""
        channels = max(1, BLOCK // self.weight.shape[1])
        y = rows.new_empty(len(rows), len(self.weight))
        for start in range(0, len(self.weight), channels):
            block = slice(start, start + channels)
            dequantized = self.weight[block].to(rows.dtype) * self.scales[block].unsqueeze(1)
            y[:, block] = ops.linear(rows, dequantized)
        return y

    def loss_sum(self, x: Tensor, labels: Tensor) -> Tensor:
        """The sum of -log p(label), if this layer is the head."""
        is_target = labels != ops.IGNORE
        logits = self(x[is_target]).float()  # (targets, V)
        return F.cross_entropy(logits, labels[is_target], reduction="sum")


def quantize_linear(model: Llama, name: str) -> None:
    """Replace a linear by an `Int8Linear`, if the parameter `name` is a linear's weight.

    A tied head is replaced with the embedding, whose weight it shares.
    """
    module_name = name.removesuffix(".weight")
    if module_name == "model.embed_tokens" and model.config.tie_embeddings:
        module_name = "lm_head"
    parent_name, _, attribute = module_name.rpartition(".")
    parent = model.get_submodule(parent_name)
    module = getattr(parent, attribute)
    if name.endswith(".weight") and isinstance(module, Linear):
        device = module.weight.device
        setattr(parent, attribute, Int8Linear(module.weight, module.bias))
        release_freed(device)  # else the process keeps what the 16-bit weights took


def _kernel_takes(weight: Tensor) -> bool:
    """Whether torch's int8 product, which is fast in bf16 on a CPU, takes this weight."""
    has_kernel = weight.is_cpu and hasattr(torch, "_weight_int8pack_mm")
    return has_kernel and weight.shape[1] % KERNEL_WIDTH == 0
