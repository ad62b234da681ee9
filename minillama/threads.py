"""How many CPU threads a command uses, and how these threads wait.

torch computes with OpenMP's threads. A thread that has finished its part waits for the others:

    actively     in a loop: it goes on at once, and keeps its core busy meanwhile
    passively    asleep: its core is free, and waking up takes some microseconds

OpenMP waits actively for some milliseconds. Beside other busy processes the loop of a waiting
thread then takes the core that a working thread needs, and a small model, which has many short
parts, becomes several times slower. So the commands choose passive waiting. OpenMP reads the
choice when torch is loaded; that is why the scripts make it, before they import torch, and why
importing minillama leaves the environment as it is. benchmarks/waiting.py measures both choices.

A second thread pays only if its part takes longer than waking it up, so the number of threads
follows the model's size and the cores that are free for this process.
"""

import math
import os
from pathlib import Path

from minillama.launch import ranks_on_machine

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # OpenMP's, GNU's, Intel's
PARAMETERS_PER_THREAD = 2_000_000  # with less work a thread costs more than it computes


def prepare_environment() -> None:
    """Let OpenMP's threads wait passively, unless the user chose. Call before torch is imported."""
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def choose_num_threads(parameters: int, ranks: int = 1) -> int:
    """Return the number of threads for one rank that computes a model with so many parameters.

    ranks: how many share this machine.

    The user's OMP_NUM_THREADS wins. torchrun sets it to 1 for each of several ranks, which is no
    choice of the user.
    """
    requested = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    is_torchruns_default = ranks > 1 and requested == "1"
    if requested.isdecimal() and int(requested) > 0 and not is_torchruns_default:
        return int(requested)
    cores_of_rank = available_cores() // ranks
    useful_threads = parameters // PARAMETERS_PER_THREAD
    return max(1, min(cores_of_rank, useful_threads))


def use_threads_for(parameters: int) -> None:
    """Let torch use as many threads as pay for a model with so many parameters."""
    import torch  # here, so that `prepare_environment` can come before it

    torch.set_num_threads(choose_num_threads(parameters, ranks_on_machine()))


def available_cores() -> int:
    """Return the number of cores that this process may use: by its affinity and its CPU quota."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        cpus = os.sched_getaffinity(0)
    else:
        cpus = set(range(os.cpu_count() or 1))
    cores = {_siblings(cpu) for cpu in cpus}
    return max(1, int(min(len(cores), cpu_quota())))


def cpu_quota(root: Path = Path("/")) -> float:
    """Return how many CPUs the cgroup (version 2) of this process may use; infinity: no limit.

    A container's limit is in cpu.max, as "QUOTA PERIOD" or "max PERIOD", of its own cgroup or of
    one above. The smallest holds.
    """
    mount = root / "sys/fs/cgroup"
    cgroup = mount
    for line in _read(root / "proc/self/cgroup").splitlines():
        if line.startswith("0::/"):
            cgroup = mount / line.removeprefix("0::/")
    quota = math.inf
    for directory in (cgroup, *cgroup.parents):
        if not directory.is_relative_to(mount):
            break
        limit, _, period = _read(directory / "cpu.max").strip().partition(" ")
        if limit.isdecimal() and period.isdecimal():
            quota = min(quota, int(limit) / int(period))
    return quota


def _siblings(cpu: int) -> str:
    """Return a name of the core that a CPU is a part of: two hyperthreads share one core."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return _read(path) or str(cpu)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
