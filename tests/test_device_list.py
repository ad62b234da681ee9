"""Several devices of one process: which ones --devices and Sophgo's variables name."""

import pytest
import torch

from minillama import comm, device
from minillama.device_list import pick_devices
from minillama.errors import UserError
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")


def chips(kind: str, *numbers: int) -> list[torch.device]:
    return [torch.device(kind, number) for number in numbers]


class FourChips:
    """Stands for `torch.cuda` or `torch.tpu` on a machine of four devices."""

    current = -1

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 4

    def set_device(self, number: int) -> None:
        self.current = number


def make_machine(kind: str, patch: pytest.MonkeyPatch) -> FourChips:
    """Let `auto` mean four devices of a kind."""
    for name in ("MINILLAMA_DEVICE", "SOPHGO_SPLIT", "USE_SOPHGO", "CHIPS", "CHIP_MAP"):
        patch.delenv(name, raising=False)
    patch.setattr(device, "_first_usable", lambda: kind)
    patch.setattr(device, "_find_problem", lambda name: "")
    module = FourChips()
    patch.setattr(torch, kind, module, raising=False)
    return module


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FourChips:
    return make_machine("cuda", monkeypatch)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("", chips("cuda", 0)),
        ("1", chips("cuda", 0)),
        ("3", chips("cuda", 0, 1, 2)),
        ("cuda:1,cuda:3", chips("cuda", 1, 3)),
        ("2, 0", chips("cuda", 2, 0)),
        ("auto:2", chips("cuda", 2)),
        ("cuda:2,cuda:2", chips("cuda", 2, 2)),
        ("cpu,cpu", [CPU, CPU]),
        ("cpu:0", [CPU]),
    ],
)
def test_devices_are_counted_or_named(
    names: str, expected: list[torch.device], machine: FourChips
) -> None:
    assert pick_devices("auto", names) == expected
    if expected[0].type == "cuda":
        assert machine.current == expected[0].index  # kernels start on the first


def pick_on_sophgos_machine(variables: dict[str, str], names: str) -> list[str]:
    torch.utils.rename_privateuse1_backend("tpu")
    with pytest.MonkeyPatch.context() as patch:
        make_machine("tpu", patch)
        for name, value in variables.items():
            patch.setenv(name, value)
        return [str(device) for device in pick_devices("auto", names)]


@pytest.mark.parametrize(
    ("variables", "names", "expected"),
    [
        ({"SOPHGO_SPLIT": "3"}, "", ["tpu:0", "tpu:1", "tpu:2"]),
        ({"SOPHGO_SPLIT": "3", "CHIPS": "1"}, "", ["tpu:1", "tpu:2", "tpu:3"]),
        ({"SOPHGO_SPLIT": "3", "CHIPS": "1"}, "2", ["tpu:1", "tpu:2"]),
        ({"SOPHGO_SPLIT": "0", "CHIPS": "2"}, "", ["tpu:2"]),
    ],
)
def test_sophgos_variables_name_successive_chips(
    variables: dict[str, str], names: str, expected: list[str]
) -> None:
    """In a process of its own, since torch has room for one plug-in."""
    assert run_on_ranks(1, pick_on_sophgos_machine, variables, names) == [expected]


@pytest.mark.parametrize(
    ("kind", "names", "message"),
    [
        ("auto", "5", r"devices = 5: cuda:4 is not there, 4 to be seen \(CUDA_VISIBLE_DEVICES"),
        ("auto", "cuda:4", "cuda:4 is not there.* from cuda:0 to cuda:3"),
        ("auto", "0", "devices = 0: name at least one"),
        ("auto", "cuda:0,cpu", "name devices of one kind"),
        ("auto", "npuu:0,npuu:1", "no device 'npuu'.*did you mean 'npu'"),
        ("auto", "cuda,cuda", "'cuda' has no number; write cuda:0"),
        ("auto", "cuda:x", "'cuda:x' has no number"),
        ("cpu", "cuda:0,cuda:1", "devices = cuda:0,cuda:1, but device = cpu"),
        ("cpu", "2", "this machine has one cpu; .*--devices cpu,cpu"),
    ],
)
def test_devices_that_cannot_be_used_are_refused(
    kind: str, names: str, message: str, machine: FourChips
) -> None:
    with pytest.raises(UserError, match=message):
        pick_devices(kind, names)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SOPHGO_SPLIT": "2"}, "SOPHGO_SPLIT=2 is about Sophgo's chips, but the device is cuda"),
        ({"SOPHGO_SPLIT": "x"}, "SOPHGO_SPLIT=x: expected a number"),
    ],
)
def test_variables_that_cannot_be_honoured_are_refused(
    variables: dict[str, str], message: str, machine: FourChips, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        pick_devices()


def test_a_variable_that_forces_another_kind_is_refused(
    machine: FourChips, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINILLAMA_DEVICE", "cpu")
    with pytest.raises(UserError, match="devices = cuda:0,cuda:1, but MINILLAMA_DEVICE = cpu"):
        pick_devices("auto", "cuda:0,cuda:1")


@pytest.mark.parametrize("names", ["2", "cuda:0,cuda:1", "cuda:0"])
def test_several_processes_with_several_devices_each_are_refused(
    names: str, machine: FourChips, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"torchrun started 4 .* --tensor_parallel 4 divides"):
        pick_devices("auto", names)
    assert pick_devices("auto", "1", local_rank=2) == chips("cuda", 2)


def test_a_process_knows_its_devices() -> None:
    with comm.start("auto", device_list="cpu,cpu") as mesh:
        assert (mesh.device, mesh.devices) == (CPU, (CPU, CPU))
    with comm.start("cpu") as mesh:
        assert (mesh.device, mesh.devices) == (CPU, (CPU,))
