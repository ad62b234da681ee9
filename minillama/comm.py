"""Ranks: who we are, how we start and stop, and the few collectives that training needs.

A `Mesh` is made once and passed down; nothing else reads RANK or WORLD_SIZE. At world size 1 every function here is the identity
and torch.distributed is never touched, so one process runs the same code as eight.

A collective that fails or times out becomes one line that names the rank. `MINILLAMA_DEBUG_COLLECTIVES=1` makes ranks compare what
they are about to call, and from where, before each call: ranks that disagree stop with both places instead of hanging.
"""

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minillama import device as devices
from minillama.errors import UserError

_ALL_GATHER = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)  # torch renamed it after 2.13


@dataclass
class Mesh:
    """This process among its peers. elements_sent: elements that went to them, as the theory counts: once for each rank they must reach."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    elements_sent: float = 0.0

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
    store, rank, _ = next(dist.rendezvous("env://"))
    # A restart by torchrun meets the addresses of the ranks that died in the same store: each attempt gets names of its own.
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(
        dist.get_default_backend_for_device(device),
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(minutes=timeout_minutes),
        pg_options=devices.group_options(device, size),
    )
    try:
        yield Mesh(rank, size, device)
    finally:
        dist.destroy_process_group()


def _call(mesh: Mesh, name: str, what: Any, collective: Callable[[], Any]) -> Any:
    """Run a collective; its failure is a line that names this rank."""
    if os.environ.get("MINILLAMA_DEBUG_COLLECTIVES") == "1":
        _compare_calls(
            mesh,
            f"{name} of {tuple(what.shape) if isinstance(what, Tensor) else type(what).__name__}",
        )
    try:
        return collective()
    except RuntimeError as error:
        raise UserError(
            f"rank {mesh.rank} of {mesh.size}: {name} failed: a peer has ended or did not answer in time; "
            f"look for the first error of another rank ({str(error).splitlines()[0]})"
        ) from error


def _compare_calls(mesh: Mesh, call: str) -> None:
    here = next(
        f"{frame.filename}:{frame.lineno}"
        for frame in reversed(traceback.extract_stack())
        if frame.filename != __file__
    )
    calls: list[str] = [""] * mesh.size
    dist.all_gather_object(calls, f"{call} at {here}")
    if len(set(calls)) > 1:
        raise UserError(
            "ranks disagree about the next collective: "
            + "; ".join(f"rank {r}: {c}" for r, c in enumerate(calls))
        )


def all_reduce_sum(mesh: Mesh, tensor: Tensor) -> Tensor:
    """Replace `tensor`, in place, by its sum over the ranks."""
    if mesh.size > 1:
        mesh.elements_sent += 2 * tensor.numel() * (mesh.size - 1) / mesh.size
        _call(mesh, "all_reduce", tensor, lambda: dist.all_reduce(tensor))
    return tensor


def any_rank(mesh: Mesh, mine: bool) -> bool:
    """Whether it is so on any rank; every rank gets the same answer."""
    return bool(all_reduce_sum(mesh, torch.tensor(float(mine), device=mesh.device)))


def reduce_to(
    mesh: Mesh, tensor: Tensor, owner: int | None, pairwise_of: int | None = None
) -> Callable[[], Tensor]:
    """Begin to sum `tensor` over the ranks for `owner` (None: for all). `tensor` may be overwritten. Returns a function that waits for the
    sum and returns it; on other ranks than the owner it means nothing.
    pairwise_of: add those of the first so many ranks in a fixed pairwise tree, ((0+1)+(2+3))+…, rather than as they come."""
    if mesh.size == 1 or owner is None:
        all_reduce_sum(mesh, tensor)
        return lambda: tensor
    mesh.elements_sent += tensor.numel() if mesh.rank != owner else 0
    if pairwise_of is None:
        work = _call(mesh, "reduce", tensor, lambda: dist.reduce(tensor, owner, async_op=True))

        def wait() -> Tensor:
            _call(mesh, "reduce", tensor, work.wait)
            return tensor

        return wait
    parts = [torch.empty_like(tensor) for _ in range(mesh.size)] if mesh.rank == owner else None
    _call(mesh, "gather", tensor, lambda: dist.gather(tensor, parts, owner))
    total = pairwise_sum(parts[:pairwise_of]) if parts else tensor
    return lambda: total


def pairwise_sum(parts: list[Tensor]) -> Tensor:
    """((0+1)+(2+3))+…: neighbours are added until one is left; an odd one out moves up as it is. Overwrites `parts`."""
    while len(parts) > 1:
        parts = [
            parts[i].add_(parts[i + 1]) if i + 1 < len(parts) else parts[i]
            for i in range(0, len(parts), 2)
        ]
    return parts[0]


def all_gather(mesh: Mesh, tensor: Tensor) -> Tensor:
    """Every rank's 1-D `tensor`, all of one size, end to end in rank order."""
    return (
        all_gather_into(mesh, tensor.new_empty(mesh.size * tensor.numel()), tensor)
        if mesh.size > 1
        else tensor
    )


def all_gather_into(mesh: Mesh, whole: Tensor, part: Tensor) -> Tensor:
    """Fill `whole` with every rank's `part`, in rank order; `part` may be this rank's own stretch of it."""
    if mesh.size > 1:
        mesh.elements_sent += part.numel() * (mesh.size - 1)
        in_place = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        if (
            in_place and mesh.device.type == "cpu"
        ):  # gloo's all_gather would hold two more copies of the whole
            for owner, stretch in enumerate(whole.split(len(part))):
                _call(mesh, "broadcast", part, partial(dist.broadcast, stretch, owner))
        else:
            _call(
                mesh,
                "all_gather",
                part,
                lambda: _ALL_GATHER(whole, part.clone() if in_place else part),
            )
    return whole


def gather_objects(mesh: Mesh, mine: Any) -> list[Any]:
    """Every rank's small Python object, in rank order."""
    found: list[Any] = [mine] * mesh.size
    if mesh.size > 1:
        _call(mesh, "all_gather_object", mine, lambda: dist.all_gather_object(found, mine))
    return found


def barrier(mesh: Mesh) -> None:
    if mesh.size > 1:
        _call(mesh, "barrier", None, dist.barrier)


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
