"""The loss of the evaluation data: a mean over targets, with the data divided over the ranks."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from minillama import comm
from minillama.data.batches import BatchPlan
from minillama.data.windows import Batch


@torch.no_grad()
def evaluation_loss(
    model: nn.Module,
    plan: BatchPlan,
    data: comm.Mesh,
    losses_of: Callable[[Sequence[Batch]], list[float]],
) -> float:
    """The mean loss per target of all batches of a plan. Every rank gets the same number.

    data: the ranks that divide the micro-batches among them.
    losses_of: the sums of -log p over the targets of micro-batches, one each.
    """
    model.eval()
    loss = 0.0
    num_targets = 0
    for step in range(plan.total_steps):
        batches = plan.micro_batches(step)
        num_targets += sum(batch.targets for batch in batches)
        for loss_of_batch in losses_of(batches[data.rank :: data.size]):
            loss += loss_of_batch
    model.train()
    return sum(comm.gather_objects(data, loss)) / num_targets
