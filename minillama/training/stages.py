"""A step and an evaluation of a run whose model is cut into pipeline stages.

`parallel.pipeline` has the schedule. Here is what it schedules: the micro-batches of this data
rank, all of which pass through every stage. The last stage has the losses; all ranks get them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minillama import comm
from minillama.data.windows import Batch
from minillama.training.run import Run


def forward_backward(
    run: Run, batches: Sequence[Batch], compute: Callable[[int], Tensor]
) -> torch.Tensor:
    """Add up the gradients of this rank's stage over its micro-batches of a global batch.

    compute: number of a micro-batch in `batches` -> the activations that this stage sends, or on
    the last stage the sum of -log p over the targets.
    Returns each micro-batch's share of the mean loss, (len(batches),), on every rank.
    """
    stage = run.stage
    assert stage is not None
    data = run.grid.data
    num_targets = max(1, sum(batch.targets for batch in batches))
    losses = torch.zeros(len(batches), device=data.device)  # fp32; each from one last stage
    own = range(data.rank, len(batches), data.size)  # micro-batch a · N + r is data rank r's

    def forward(number: int) -> Tensor:
        output = compute(own[number])
        if not stage.is_last:
            return output
        loss = output / num_targets
        losses[own[number]] = loss.detach()
        return loss

    def backward(number: int, loss: Tensor | None) -> None:
        if loss is not None and not loss.requires_grad:
            loss = None  # nothing up to this stage is trained
        active_ranks = min(data.size, len(batches) - number * data.size)
        run.optimizer.backward(loss, active_ranks)

    stage.run_1f1b([len(batches[index].tokens) for index in own], forward, backward)
    num_rounds = -(-len(batches) // data.size)
    if len(own) < num_rounds:  # other data ranks have one micro-batch more
        backward(len(own), None)
    comm.all_reduce_sum(data, losses)
    return comm.all_reduce_sum(run.grid.stage, losses)


def losses_of(
    run: Run, batches: Sequence[Batch], loss_sum: Callable[[Batch], Tensor]
) -> list[float]:
    """The sums of -log p over the targets of micro-batches, one each, on every stage.

    loss_sum: what this stage computes of a micro-batch. Called without gradients.
    """
    stage = run.stage
    assert stage is not None
    losses: list[float] = []

    def forward(number: int) -> Tensor:
        output = loss_sum(batches[number])
        if stage.is_last:
            losses.append(float(output))
        return output

    stage.run_forward([len(batch.tokens) for batch in batches], forward)
    return comm.gather_objects(stage.mesh, losses)[-1]
