"""Messages between two ranks of a line, as the stages of a pipeline send them.

A stage sends activations to the next stage while that one sends gradients back. A device works
through its queue in order. If each of two ranks queued its send before its receive, both could wait
forever. So `exchange` gives all sends and receives to torch as one batch, in which they run at the
same time:

    stage 0    send activations 1 to stage 1, receive gradients 0 from stage 1    one batch
    stage 1    send gradients 0 to stage 0, receive activations 1 from stage 0    one batch

The receiver knows the shape and the dtype of what comes. Nothing else is sent along.
"""

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor

from minillama.comm import Mesh
from minillama.errors import UserError


def exchange(mesh: Mesh, peer: int, sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
    """Send to a rank of the line and receive from it; return when everything has arrived.

    Tensors arrive in the order in which they are listed.

    Args:
        received: these are overwritten.

    Raises UserError if the peer has ended, or does not answer in time.
    """
    operations = []
    for tensor in sent:
        mesh.elements_sent += tensor.numel()
        operations.append(_operation(dist.isend, tensor.contiguous(), mesh, peer))
    for tensor in received:
        operations.append(_operation(dist.irecv, tensor, mesh, peer))
    if not operations:
        return
    try:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rank {mesh.rank} of {mesh.size}: the exchange with rank {peer} failed: it has ended "
            f"or did not answer in time; look for the first error of another rank ({reason})"
        ) from error


def _operation(kind: Callable, tensor: Tensor, mesh: Mesh, peer: int) -> dist.P2POp:
    return dist.P2POp(kind, tensor, group=mesh.group, group_peer=peer)
