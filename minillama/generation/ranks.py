"""Generation on tensor ranks: each has a part of the model, and all of them write the same text.

    torchrun --nproc_per_node 2 generate.py --tensor_parallel 2 …

Every rank has the same logits, to the bit, and the same seed. So all choose the same tokens, and no
token is sent. Rank 0 reads what a person types and tells the others. It alone prints and writes.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from minillama import comm
from minillama.comm import Mesh
from minillama.errors import UserError
from minillama.launch import world_size

MINUTES = 30.0  # of a collective
MINUTES_OF_A_WEEK = 7 * 24 * 60.0  # of one that waits for a person


class _Nowhere(io.StringIO):
    """A stream that forgets what is written to it."""

    def write(self, text: str) -> int:
        return len(text)


@contextmanager
def first_rank_prints(mesh: Mesh) -> Iterator[None]:
    """Let what other ranks print disappear, until the block ends."""
    if mesh.is_first:
        yield
        return
    with redirect_stdout(_Nowhere()), redirect_stderr(_Nowhere()):
        yield


@contextmanager
def start_tensor_ranks(
    tensor_parallel: int, device: str, devices: str, waits_for_person: bool
) -> Iterator[Mesh]:
    """The ranks that torchrun started, all of them on one tensor line, until the block ends.

    device, devices: as the flags of these names.
    Raises UserError unless there are as many ranks as the line has.
    """
    _refuse_other_number(tensor_parallel)
    minutes = MINUTES_OF_A_WEEK if waits_for_person else MINUTES
    with comm.start(device, minutes, devices) as mesh, first_rank_prints(mesh):
        yield mesh


def _refuse_other_number(tensor_parallel: int) -> None:
    started = world_size()
    if started == tensor_parallel:
        return
    if started == 1:
        raise UserError(
            f"--tensor_parallel {tensor_parallel} needs {tensor_parallel} ranks; start them: "
            f"torchrun --nproc_per_node {tensor_parallel} generate.py …"
        )
    raise UserError(
        f"torchrun started {started} ranks, and --tensor_parallel is {tensor_parallel}; "
        f"use --tensor_parallel {started}, which divides the model among them"
    )


def share_from_first(mesh: Mesh, item: Any) -> Any:
    """A small Python object of rank 0, on all ranks."""
    return comm.gather_objects(mesh, item)[0]
