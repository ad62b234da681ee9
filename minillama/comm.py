"""Ranks: who we are, how we start and stop, and the few collectives that training needs.

A `Mesh` is made once and passed down; nothing else reads RANK or WORLD_SIZE. At world size 1 every function here is the identity
and torch.distributed is never touched, so one process runs the same code as eight.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from minillama import device as devices


@dataclass(frozen=True)
class Mesh:
    """This process among its peers."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def print(self, *words: object) -> None:
        """Print on rank 0 only."""
        if self.is_first:
            print(*words, flush=True)


@contextmanager
def start(device_name: str = "auto", timeout_minutes: float = 30.0) -> Iterator[Mesh]:
    """The mesh of this process, as torchrun's environment describes it; the process group is gone afterwards."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = devices.pick(device_name, int(os.environ.get("LOCAL_RANK", "0")))
    if size == 1:
        yield Mesh(device=device)
        return
    dist.init_process_group(devices.process_group_backend(device), timeout=timedelta(minutes=timeout_minutes))
    try:
        yield Mesh(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


def all_reduce_sum(mesh: Mesh, tensor: Tensor) -> Tensor:
    """Replace `tensor`, in place, by its sum over the ranks."""
    if mesh.size > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast(mesh: Mesh, tensor: Tensor) -> Tensor:
    """Replace `tensor`, in place, by rank 0's."""
    if mesh.size > 1:
        dist.broadcast(tensor, 0)
    return tensor


def barrier(mesh: Mesh) -> None:
    if mesh.size > 1:
        dist.barrier()


@contextmanager
def first_rank_first(mesh: Mesh) -> Iterator[None]:
    """Let rank 0 run the body before the others do: it makes a file, they find it."""
    if not mesh.is_first:
        barrier(mesh)
    try:
        yield
    finally:
        if mesh.is_first:
            barrier(mesh)
