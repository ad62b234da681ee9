"""Ranks: which one this process is, how ranks start and stop, and the collectives of training.

A `Mesh` is made once and passed down; `launch` reads what torchrun says. With one rank every
function here is the identity and torch.distributed is never used, so one process runs the same code
as eight.

torchrun stops its ranks when one of them fails. If torchrun itself is killed, nobody does, so each
rank looks once a second whether its launcher is still there.

A collective that fails or times out raises a one-line error that names the rank. With
`MINILLAMA_DEBUG_COLLECTIVES=1` ranks compare what they are about to call, and from where, before
each call: ranks that disagree stop with both places instead of waiting for each other."""

import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minillama import device as devices
from minillama.device_list import pick_devices
from minillama.errors import UserError, listed
from minillama.launch import read_launch, rendezvous_address, stop_with_launcher

# torch renamed all_gather_into_tensor after 2.13.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

RENDEZVOUS_TIMEOUT = timedelta(minutes=5)  # for all ranks to start


@dataclass
class Mesh:
    """This process among its peers.

    group: torch's process group of these ranks; None: all ranks. Ranks are numbered within it.
    elements_sent: to other ranks; a tensor's element counts once for each rank it must reach."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    elements_sent: float = 0.0
    group: dist.ProcessGroup | None = None
    timeout_minutes: float = 30.0  # of a collective
    devices: tuple[torch.device, ...] = ()  # if a model is spread over several; else ()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def print(self, *words: object) -> None:
        """Print on rank 0 only."""
        if self.is_first:
            print(*words, flush=True)


@contextmanager
def start(
    device_name: str = "auto", timeout_minutes: float = 30.0, device_list: str = ""
) -> Iterator[Mesh]:
    """The mesh of this process, as torchrun's environment describes it, until the block ends.

    device_list: several devices for this process, as --devices names them.
    """
    stop_with_launcher()
    rank, size, local_rank = read_launch()
    own_devices = tuple(pick_devices(device_name, device_list, local_rank))
    device = own_devices[0]
    if size == 1:
        yield Mesh(device=device, devices=own_devices)
        return
    store = _rendezvous(rank, size)
    # torchrun restarts ranks with the same store, which still holds the addresses of the ranks that
    # died. So each attempt uses a prefix of its own.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt-{attempt}", store)
    dist.init_process_group(
        dist.get_default_backend_for_device(device),
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(minutes=timeout_minutes),
        pg_options=devices.group_options(device, size),
    )
    try:
        yield Mesh(rank, size, device, timeout_minutes=timeout_minutes, devices=own_devices)
    finally:
        dist.destroy_process_group()


def _rendezvous(rank: int, size: int) -> dist.Store:
    """The store through which the ranks find each other; rank 0 or torchrun has it.

    Raises UserError if it cannot be reached, or a rank does not come.
    """
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rank {rank} of {size}: the ranks do not meet at {rendezvous_address()}: the address "
            f"must be that of rank 0's machine, the port free, and every rank started ({reason})"
        ) from error
    return store


def _call(mesh: Mesh, name: str, argument: Any, collective: Callable[[], Any]) -> Any:
    """Run a collective. If it fails, the error names this rank."""
    if os.environ.get("MINILLAMA_DEBUG_COLLECTIVES") == "1":
        kind = tuple(argument.shape) if isinstance(argument, Tensor) else type(argument).__name__
        _compare_calls(mesh, f"{name} of {kind}")
    try:
        return collective()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rank {mesh.rank} of {mesh.size}: {name} failed: a peer has ended or did not answer "
            f"in time; look for the first error of another rank ({reason})"
        ) from error


def _compare_calls(mesh: Mesh, call: str) -> None:
    """Raise UserError if ranks are about to call different collectives."""
    stack = reversed(traceback.extract_stack())
    caller = next(frame for frame in stack if frame.filename != __file__)
    place = f"{call} at {caller.filename}:{caller.lineno}"
    calls: list[str] = [""] * mesh.size
    dist.all_gather_object(calls, place, group=mesh.group)
    if len(set(calls)) > 1:
        all_calls = "; ".join(f"rank {rank}: {call}" for rank, call in enumerate(calls))
        raise UserError(f"ranks disagree about the next collective: {all_calls}")


def all_reduce_sum(mesh: Mesh, tensor: Tensor) -> Tensor:
    """Replace `tensor`, in place, by its sum over the ranks."""
    if mesh.size > 1:
        mesh.elements_sent += 2 * tensor.numel() * (mesh.size - 1) / mesh.size
        _call(mesh, "all_reduce", tensor, lambda: dist.all_reduce(tensor, group=mesh.group))
    return tensor


def all_reduce_max(mesh: Mesh, tensor: Tensor) -> Tensor:
    """Replace `tensor`, in place, by its elementwise maximum over the ranks."""
    if mesh.size > 1:
        mesh.elements_sent += 2 * tensor.numel() * (mesh.size - 1) / mesh.size
        largest = partial(dist.all_reduce, tensor, dist.ReduceOp.MAX, mesh.group)
        _call(mesh, "all_reduce", tensor, largest)
    return tensor


def any_rank(mesh: Mesh, condition: bool) -> bool:
    """Whether `condition` is true on any rank. Every rank gets the same result."""
    votes = torch.tensor(float(condition), device=mesh.device)
    return bool(all_reduce_sum(mesh, votes))


def reduce_to(
    mesh: Mesh, tensor: Tensor, owner: int | None, pairwise_of: int | None = None
) -> Callable[[], Tensor]:
    """Start to sum `tensor` over the ranks. `tensor` may be overwritten.

    Args:
        owner: the rank that gets the sum; None: all ranks do.
        pairwise_of: add the tensors of the first `pairwise_of` ranks in a fixed pairwise tree,
            ((0+1)+(2+3))+…, instead of in the order of their arrival.

    Returns a function that waits for the sum and returns it. Its result is undefined on ranks other
    than the owner."""
    if mesh.size == 1 or owner is None:
        all_reduce_sum(mesh, tensor)
        return lambda: tensor
    if mesh.rank != owner:
        mesh.elements_sent += tensor.numel()
    if pairwise_of is not None:
        total = _gather_and_add(mesh, tensor, owner, pairwise_of)
        return lambda: total
    start = partial(dist.reduce, tensor, group=mesh.group, async_op=True, group_dst=owner)
    work = _call(mesh, "reduce", tensor, start)

    def wait() -> Tensor:
        _call(mesh, "reduce", tensor, work.wait)
        return tensor

    return wait


def _gather_and_add(mesh: Mesh, tensor: Tensor, owner: int, num_ranks: int) -> Tensor:
    """The pairwise sum of the first `num_ranks` ranks' tensors, on the owner."""
    if mesh.rank != owner:
        send = partial(dist.gather, tensor, group=mesh.group, group_dst=owner)
        _call(mesh, "gather", tensor, send)
        return tensor
    tensors = [torch.empty_like(tensor) for _ in range(mesh.size)]
    receive = partial(dist.gather, tensor, tensors, group=mesh.group, group_dst=owner)
    _call(mesh, "gather", tensor, receive)
    return pairwise_sum(tensors[:num_ranks])


def pairwise_sum(tensors: list[Tensor]) -> Tensor:
    """((0+1)+(2+3))+…: add neighbours until one tensor is left. Overwrites the tensors.

    The last of an odd number moves up to the next level as it is.
    """
    while len(tensors) > 1:
        level = [left.add_(right) for left, right in zip(tensors[::2], tensors[1::2], strict=False)]
        if len(tensors) % 2:
            level.append(tensors[-1])
        tensors = level
    return tensors[0]


def all_gather(mesh: Mesh, tensor: Tensor) -> Tensor:
    """Every rank's 1-D `tensor`, all of one size, end to end in rank order."""
    if mesh.size == 1:
        return tensor
    return all_gather_into(mesh, tensor.new_empty(mesh.size * tensor.numel()), tensor)


def all_gather_into(mesh: Mesh, whole: Tensor, part: Tensor) -> Tensor:
    """Fill `whole` with every rank's `part`, in rank order, and return it.

    `part` may be this rank's own range of `whole`.
    """
    if mesh.size == 1:
        return whole
    in_place = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    if in_place and mesh.device.type == "cpu":
        # gloo's all_gather would hold two more copies of the whole.
        for owner, shard in enumerate(whole.split(len(part))):
            broadcast(mesh, shard, owner)
    else:
        mesh.elements_sent += part.numel() * (mesh.size - 1)
        source = part.clone() if in_place else part
        _call(mesh, "all_gather", part, lambda: _ALL_GATHER(whole, source, group=mesh.group))
    return whole


def broadcast(mesh: Mesh, tensor: Tensor, owner: int) -> Tensor:
    """Fill `tensor`, in place, with that of the owner."""
    if mesh.size > 1:
        if mesh.rank == owner:
            mesh.elements_sent += tensor.numel() * (mesh.size - 1)
        fill = partial(dist.broadcast, tensor, group=mesh.group, group_src=owner)
        _call(mesh, "broadcast", tensor, fill)
    return tensor


def gather_objects(mesh: Mesh, item: Any) -> list[Any]:
    """Every rank's small Python object, in rank order."""
    items: list[Any] = [item] * mesh.size
    if mesh.size > 1:
        gather = partial(dist.all_gather_object, items, item, group=mesh.group)
        _call(mesh, "all_gather_object", item, gather)
    return items


def raise_together(mesh: Mesh, error: str | None) -> None:
    """Raise UserError on every rank if any has an error: that of the lowest rank."""
    errors = [text for text in gather_objects(mesh, error) if text is not None]
    if errors:
        raise UserError(errors[0])


def refuse_differences(mesh: Mesh, values: Mapping[str, Any], remedy: str) -> None:
    """Raise UserError, on every rank, unless all ranks have equal values under all names."""
    all_values = gather_objects(mesh, dict(values))
    expected = all_values[0]
    problems = []
    for rank, other in enumerate(all_values):
        for name in expected | other:
            first = expected.get(name)
            value = other.get(name)
            if value != first:
                problems.append(f"{name} is {first!r} on rank 0, {value!r} on rank {rank}")
    if problems:
        raise UserError(f"ranks differ: {listed(problems)}; {remedy}")


def barrier(mesh: Mesh) -> None:
    """Wait for all ranks."""
    if mesh.size > 1:
        _call(mesh, "barrier", None, partial(dist.barrier, group=mesh.group))


@contextmanager
def first_rank_first(mesh: Mesh) -> Iterator[None]:
    """Run the body on rank 0 before the other ranks: it makes a file, they find it."""
    if not mesh.is_first:
        barrier(mesh)
    try:
        yield
    finally:
        if mesh.is_first:
            barrier(mesh)
