"""NaN and infinity: found before training, counted while it runs, and kept out of what is saved.

weights that are loaded     refused by name
loss or gradient of a step  the step is skipped; a run ends after MAX_SKIPPED_IN_A_ROW of them
weights to be saved         refused by name, so that no checkpoint of before is replaced
"""

import math
from pathlib import Path

from torch import nn

from minillama import comm
from minillama.checkpoint.hf_reader import non_finite_on_any_rank
from minillama.errors import UserError
from minillama.parallel.sharded_optimizer import ShardedOptimizer

MAX_SKIPPED_IN_A_ROW = 5  # overflows of fp16 end with its smallest loss scale instead


class SkipWatch:
    """Ends a run whose steps are skipped again and again."""

    def __init__(self, out_dir: Path) -> None:
        self.out_dir = out_dir
        self.in_a_row = 0

    def count(self, step: int, loss: float, updated: bool, optimizer: ShardedOptimizer) -> None:
        """Count a step. Raises UserError if too many were without an update, one after another."""
        is_looking_for_scale = math.isfinite(loss) and optimizer.loss_scale is not None
        if updated or is_looking_for_scale:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        if self.in_a_row == MAX_SKIPPED_IN_A_ROW:
            name = optimizer.first_non_finite() or "the loss"
            raise UserError(
                f"step {step}: loss {loss} or its gradient (first: {name}) was not finite "
                f"{self.in_a_row} steps in a row; lower --learning_rate, or look for "
                f"broken records in the data; checkpoints are in {self.out_dir}"
            )


def refuse_useless_model(
    model: nn.Module, mesh: comm.Mesh, steps: int, skipped: int, out_dir: Path
) -> None:
    """Raise UserError, on all ranks, if no step changed the weights, or they are not finite.

    skipped: how many of the steps made no update. Called before final/ is written.
    """
    if skipped == steps > 0:
        raise UserError(
            f"none of {steps} steps changed the weights: each had a loss or gradient that was not "
            f"finite; {out_dir / 'final'} was not written; lower --learning_rate (in fp16: "
            "--initial_scale_power), or look for broken records in the data"
        )
    name = non_finite_on_any_rank(model, mesh)
    if name:
        raise UserError(
            f"after step {steps}, {name} holds NaN or infinity; {out_dir / 'final'} was not "
            "written; lower --learning_rate, and go on from a checkpoint with --resume DIR"
        )
