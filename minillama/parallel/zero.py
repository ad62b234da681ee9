"""The optimizer over one flat vector.

The trainable parameters, matrices first and then the vectors that never decay, lie end to end in one flat fp32 vector; so do the
gradients and Adam's two moments. Clipping is then one norm, AdamW two calls, averaging over ranks one collective.

    flat     | q_proj ......... | k_proj ... | …matrices… | norm | norm | bias |
    grad     |                                            |                    |     fp32, accumulated over micro-batches
    m, v     |<------------- weight decay --------------->|<---- no decay ---->|

An fp32 parameter is a view into `flat`; a 16-bit one is a rounded copy, written anew after each step, so that updates smaller
than its last bit are not lost. Every rank holds all of it (stage 0).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from minillama import ops
from minillama.comm import Mesh, all_reduce_sum


class FlatAdamW:
    """AdamW over the trainable parameters of a model, as one vector."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], mesh: Mesh, *, beta1: float, beta2: float, epsilon: float,
                 weight_decay: float) -> None:
        trainable = [(name, p) for name, p in named if p.requires_grad]
        self.named = [x for x in trainable if x[1].ndim > 1] + [x for x in trainable if x[1].ndim <= 1]
        self.mesh, self.settings = mesh, {"beta1": beta1, "beta2": beta2, "epsilon": epsilon}
        self.decayed = sum(p.numel() for _, p in self.named if p.ndim > 1)
        self.weight_decay, self.steps = weight_decay, 0
        size, device = sum(p.numel() for _, p in self.named), self.named[0][1].device
        self.flat, self.grad, self.m, self.v = (torch.zeros(size, dtype=torch.float32, device=device) for _ in range(4))
        self._adopt()

    def _adopt(self) -> None:
        """Copy the parameters into the flat vector, make fp32 ones views of it, and route gradients to the flat gradient."""
        for (_, parameter), weight, grad in zip(self.named, self._views(self.flat), self._views(self.grad), strict=True):
            weight.copy_(parameter.detach())
            if parameter.dtype == torch.float32:
                parameter.data, parameter.grad = weight, grad
            else:
                parameter.register_post_accumulate_grad_hook(_move_gradient_into(grad))

    def _views(self, vector: Tensor) -> list[Tensor]:
        """`vector` cut into the parameters' shapes."""
        parts = vector.split([p.numel() for _, p in self.named])
        return [part.view(p.shape) for part, (_, p) in zip(parts, self.named, strict=True)]

    def zero_grad(self) -> None:
        self.grad.zero_()

    def reduce_gradients(self) -> None:
        """Sum the gradients over the ranks; losses are already divided by the targets of the whole global batch."""
        all_reduce_sum(self.mesh, self.grad)

    def clip(self, max_norm: float) -> float:
        """Scale the gradient down to `max_norm` (0: do not); returns its norm before that."""
        norm = float(torch.linalg.vector_norm(self.grad))
        if max_norm and norm > max_norm:
            self.grad.mul_(max_norm / (norm + 1e-6))
        return norm

    def step(self, learning_rate: float) -> None:
        """One AdamW update of every parameter."""
        self.steps += 1
        for span, decay in ((slice(0, self.decayed), self.weight_decay), (slice(self.decayed, None), 0.0)):
            if len(self.flat[span]):
                ops.adamw(self.flat[span], self.grad[span], self.m[span], self.v[span], self.steps,
                          learning_rate=learning_rate, weight_decay=decay, **self.settings)
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        """Write the masters' values into the 16-bit parameters."""
        for (_, parameter), weight in zip(self.named, self._views(self.flat), strict=True):
            if parameter.dtype != torch.float32:
                parameter.copy_(weight)

    def non_finite(self) -> str:
        """The name of the first parameter with a gradient that is not a number, or an empty string."""
        return next((name for (name, _), grad in zip(self.named, self._views(self.grad), strict=True) if not grad.isfinite().all()), "")

    def state(self) -> dict[str, Tensor]:
        """Masters, moments and step count: with the data position, all that an exact continuation needs."""
        return {"flat": self.flat, "m": self.m, "v": self.v, "steps": torch.tensor(self.steps)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name in ("flat", "m", "v"):
            getattr(self, name).copy_(state[name])
        self.steps = int(state["steps"])
        self._publish()


def _move_gradient_into(grad: Tensor):
    def hook(parameter: nn.Parameter) -> None:
        grad.add_(parameter.grad)
        parameter.grad = None
    return hook
