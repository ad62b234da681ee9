"""The loss scale of fp16: gradients below 2^-24 would become zero, so the loss is multiplied by it.

The optimizer's step divides by it again. If the scale is too large, some gradient is not finite.
"""

from dataclasses import asdict, dataclass
from typing import Any

from minillama.errors import UserError


@dataclass
class LossScale:
    """DeepSpeed's dynamic loss scale: halve it after `hysteresis` overflows, double it after
    `window` good steps.
    """

    scale: float = 2.0**16
    window: int = 1000
    hysteresis: int = 2
    minimum: float = 1.0
    hysteresis_left: int = 2  # overflows left until the scale is halved
    good_steps: int = 0  # since the last overflow

    def on_overflow(self) -> None:
        """Count an overflow. Raises UserError if the scale cannot be lowered any further."""
        self.good_steps = 0
        if self.hysteresis_left > 1:
            self.hysteresis_left -= 1
        elif self.scale <= self.minimum:
            raise UserError(
                f"fp16: gradients overflow at the smallest loss scale {self.minimum:g}; "
                "use --precision bf16 or fp32"
            )
        else:
            self.scale = max(self.scale / 2, self.minimum)

    def on_success(self) -> None:
        """Count a step without overflow."""
        self.good_steps += 1
        if self.good_steps % self.window == 0:
            self.scale *= 2
            self.hysteresis_left = self.hysteresis

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds. `patience` is the name of hysteresis_left in state.json."""
        state = asdict(self)
        state["patience"] = state.pop("hysteresis_left")
        return state

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "LossScale":
        """The loss scale that `state()` described."""
        fields = dict(state)
        fields["hysteresis_left"] = fields.pop("patience")
        return cls(**fields)
