"""A device that is not there: tensors that say `npu:0` (or mlu, tpu) and are on the host.

torch lets a pure-Python back end take the place of a vendor's plug-in
(`_setup_privateuseone_for_python_backend`, experimental, torch 2.13). Every tensor of the device is
a `DeviceTensor`: a wrapper whose `host` is an ordinary tensor. Operators are run on the hosts and
their results wrapped again; a tensor of the CPU among them is refused, as a real device
would. What this proves is plumbing: what is moved where, what is called with which devices, what is
saved and gathered. One device name a process, so each has processes of its own.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.vendor import ascend, cambricon, sophgo

BACKENDS = {"npu": "hccl", "mlu": "cncl", "tpu": "sccl"}

CHIPS = 2


def is_possible() -> bool:
    """Whether this torch has the experimental interface."""
    return hasattr(torch._C, "_acc")


class DeviceTensor(torch.Tensor):
    """A tensor of the device; `host` holds its numbers, and views of it share them."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> "DeviceTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(name(), 0),
        )
        made.host = host
        return made

    @property
    def device(self) -> torch.device:
        """The process's one chip. Autograd knows only chip 0 of such a back end."""
        return torch.device(name(), torch.get_device_module(name()).index)

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return run_on_host(function, args, kwargs or {})

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host.untyped_storage()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: "DeviceTensor") -> None:
        assert self.shape == other.shape
        self.host = other.host

    def __repr__(self) -> str:
        raise AssertionError("a tensor of the device is printed: move it to the host first")

    def __reduce_ex__(self, protocol: int) -> Any:
        raise AssertionError("a tensor of the device is pickled: move it to the host first")

    def tolist(self) -> Any:
        return self.host.tolist()

    def numpy(self) -> Any:
        raise TypeError("can't convert a tensor of the device to numpy; use Tensor.cpu() first")


def name() -> str:
    return torch._C._get_privateuse1_backend_name()


def run_on_host(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operator on the hosts of its tensors.

    Only copies may mix the device with the CPU.
    """
    operator = function.__name__.split(".")[0]
    tensors = [x for x in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(x, Tensor)]
    of_device = [x for x in tensors if isinstance(x, DeviceTensor)]
    copies = operator in ("_to_copy", "copy_", "_copy_from", "_copy_from_and_resize")
    if (
        of_device
        and not copies
        and any(not isinstance(x, DeviceTensor) and x.dim() for x in tensors)
    ):  # a number of the host may take part
        raise RuntimeError(
            f"{function}: Expected all tensors to be on the same device, found "
            f"{[str(x.device) for x in tensors]}"
        )
    asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if (
        asked is not None
        and asked.type == name()
        and asked.index not in (None, 0, torch.get_device_module(name()).index)
    ):
        raise RuntimeError(f"{function}: {asked} is the chip of another process")
    host_args, host_kwargs = pytree.tree_map_only(DeviceTensor, lambda x: x.host, (args, kwargs))
    if asked is not None:
        host_kwargs["device"] = torch.device("cpu")
    host_kwargs.pop("pin_memory", None)
    if operator in ("_copy_from", "_copy_from_and_resize"):
        source, target = host_args[:2]
        (target.resize_(source.shape) if operator.endswith("resize") else target).copy_(source)
        return args[1]
    result = function(*host_args, **host_kwargs)
    if operator == "copy_" and of_device[0] is not args[0]:
        return args[0]
    if asked is not None and asked.type != name():
        return result
    hosts = {id(x.host): x for x in of_device}
    return pytree.tree_map_only(
        Tensor, lambda x: hosts[id(x)] if id(x) in hosts else DeviceTensor(x), result
    )


class DeviceModule(ModuleType):
    """`torch.npu` and the like: what device.py asks of it."""

    def __init__(self, device_name: str) -> None:
        super().__init__(f"torch.{device_name}")
        self.generator, self.index = torch.Generator(), 0

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return CHIPS

    def current_device(self) -> int:
        return self.index

    def set_device(self, device: Any) -> None:
        index = device if isinstance(device, int) else torch.device(device).index
        assert 0 <= index < CHIPS
        self.index = index

    def synchronize(self, device: Any = None) -> None:
        pass

    def memory_allocated(self, device: Any = None) -> int:
        return 1 << 20

    def max_memory_allocated(self, device: Any = None) -> int:
        return 1 << 21

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        pass

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return 1 << 30, 1 << 31

    def is_bf16_supported(self) -> bool:
        return True

    def manual_seed_all(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    manual_seed = manual_seed_all

    def get_rng_state(self, device: Any = None) -> Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        self.generator.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def _is_in_bad_fork(self) -> bool:
        return False


class FakeGroup(dist.ProcessGroup):
    """hccl, cncl or sccl, as gloo on the hosts.

    Takes tensors of the device only, as the vendors' libraries do.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
        self._register_backend(
            torch.device(name()), dist.ProcessGroup.BackendType.CUSTOM, self.gloo
        )  # objects are gathered on the device

    def _call(self, collective: str, *args: Any) -> dist.Work:
        def host(x: Tensor) -> Tensor:
            assert isinstance(x, DeviceTensor), (
                f"{collective}: a tensor on {x.device} in a group of the device"
            )
            assert x.dtype != torch.float64, (
                f"{collective}: the vendors' libraries do not reduce float64"
            )
            return x.host

        return getattr(self.gloo, collective)(*pytree.tree_map_only(Tensor, host, args))

    def allreduce(self, tensors: Any, options: Any = None) -> dist.Work:
        return self._call("allreduce", tensors, options)

    def broadcast(self, tensors: Any, options: Any = None) -> dist.Work:
        return self._call("broadcast", tensors, options)

    def reduce(self, tensors: Any, options: Any = None) -> dist.Work:
        return self._call("reduce", tensors, options)

    def allgather(self, outputs: Any, inputs: Any, options: Any = None) -> dist.Work:
        return self._call("allgather", outputs, inputs, options)

    def _allgather_base(self, output: Tensor, input: Tensor, options: Any = None) -> dist.Work:
        return self._call("_allgather_base", output, input, options)

    all_gather_single = _allgather_base  # torch 2.13's name

    def gather(self, outputs: Any, inputs: Any, options: Any = None) -> dist.Work:
        return self._call("gather", outputs, inputs, options)

    def barrier(self, opts: Any = None) -> dist.Work:
        return self.gloo.barrier()

    def getBackendName(self) -> str:
        return "fake"


def install(vendor: str) -> ModuleType:
    """Give this process an accelerator called `vendor`, with the vendor's kernels.

    Returns its module, `torch.VENDOR`.
    """
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    module = DeviceModule(vendor)
    _setup_privateuseone_for_python_backend(vendor, backend_module=module)
    library = torch.library.Library("_", "IMPL")
    library.fallback(
        lambda function, *args, **kwargs: run_on_host(function, args, kwargs), "PrivateUse1"
    )
    by_name = torch.library.Library("aten", "IMPL")
    for operator in (
        "_copy_from",
        "copy_",
        "_to_copy",
        "_copy_from_and_resize",
    ):  # reached past the fallback by torch.tensor
        function = getattr(torch.ops.aten, operator).default
        by_name.impl(operator, partial(_run_by_name, function), "PrivateUse1")
    KEPT.extend((library, by_name))

    def create(about: Any, options: Any) -> FakeGroup:
        assert vendor != "tpu" or options.chip_map[about.group_rank] == module.index, (
            "sccl wants the ring of chips"
        )
        return FakeGroup(about.store, about.group_rank, about.group_size, about.timeout)

    dist.Backend.register_backend(BACKENDS[vendor], create, extended_api=True, devices=[vendor])
    {"npu": ascend, "mlu": cambricon, "tpu": sophgo}[vendor].install()
    return module


def _run_by_name(function: Any, *args: Any, **kwargs: Any) -> Any:
    return run_on_host(function, args, kwargs)


KEPT: list[Callable | Any] = []  # torch.library forgets what nobody holds
