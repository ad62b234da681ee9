"""The loss of the evaluation data: a mean over targets, with the data divided over the ranks."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minillama import comm
from minillama.data.batches import BatchPlan
from minillama.data.windows import Batch


@torch.no_grad()
def evaluation_loss(
    model: nn.Module, plan: BatchPlan, data: comm.Mesh, loss_sum: Callable[[Batch], Tensor]
) -> float:
    """The mean loss per target of all batches of a plan. Every rank gets the same number.

    data: the ranks that divide the micro-batches among them.
    loss_sum: the sum of -log p over the targets of a micro-batch, ().
    """
    model.eval()
    loss = 0.0
    num_targets = 0
    for step in range(plan.total_steps):
        batches = plan.micro_batches(step)
        num_targets += sum(batch.targets for batch in batches)
        for batch in batches[data.rank :: data.size]:
            loss += float(loss_sum(batch))
    model.train()
    return sum(comm.gather_objects(data, loss)) / num_targets
