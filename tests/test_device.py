"""Devices: which one is picked, by what, and what is said where it is not there. Plug-ins that are
not here are written for the test: packages that put a fake device (`tests.vendor.fake_device`) in
their vendor's place. One plug-in a process, so most tests start one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minillama import device
from minillama.errors import UserError
from minillama.memory import device_memory
from tests.vendor import fake_device

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
needs_fake = pytest.mark.skipif(
    not fake_device.is_possible(), reason="this torch has no pure-Python back ends"
)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MINILLAMA_DEVICE", "SOPHGO_SPLIT", "USE_SOPHGO", "CHIPS", "CHIP_MAP"):
        monkeypatch.delenv(name, raising=False)


def package(folder: Path, name: str, code: str, metadata: str = "", entry: str = "") -> None:
    """A package in a folder of PYTHONPATH, with the metadata an installer would leave."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    if metadata or entry:
        about = folder / f"{name}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{metadata}"
        )
        (about / "entry_points.txt").write_text(
            f"[torch.backends]\n{name} = {entry}\n" if entry else ""
        )


def fake_plugin(folder: Path, name: str, **installed: str) -> None:
    code = (
        f"from tests.vendor import fake_device\nfake_device.install({name!r})\ndef load(): pass\n"
    )
    package(folder, f"torch_{name}", code, **installed)


def run(
    folder: Path, program: str, script: str = "", **variables: str
) -> subprocess.CompletedProcess:
    """A process that finds the packages of a folder."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    command = [
        sys.executable,
        *(
            script.split()
            if script
            else ("-c", "from minillama import device, ops\nimport torch\n" + program)
        ),
    ]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path} | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


def lines(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("npu", "pip install torch-npu"),
        ("mlu", "torch_mlu wheel"),
        ("tpu", "sophgo/torch-tpu"),
        ("cuda", "a CUDA build of torch"),
    ],
)
def test_a_device_that_is_not_here_says_what_to_install(name: str, remedy: str) -> None:
    if hasattr(torch, name) and getattr(torch, name).is_available():
        pytest.skip(f"{name} is here")
    with pytest.raises(UserError, match=f"device '{name}' cannot be used") as error:
        device.pick(name)
    assert remedy in str(error.value)


def test_a_variable_overrides_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINILLAMA_DEVICE", "cpu")
    assert device.pick("auto") == device.pick("npu") == CPU
    monkeypatch.setenv("MINILLAMA_DEVICE", "mlu")
    with pytest.raises(
        UserError, match=r"torch_mlu is not installed \(MINILLAMA_DEVICE asks for it\)"
    ):
        device.pick("cpu")
    monkeypatch.setenv("MINILLAMA_DEVICE", "npuu")
    with pytest.raises(UserError, match=r"MINILLAMA_DEVICE=npuu .did you mean 'npu'"):
        device.pick("cpu")


def test_a_machine_of_sophgos_says_so_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_SOPHGO", "1")
    assert device.pick("cpu") == CPU
    with pytest.raises(UserError, match="device 'tpu' cannot be used"):
        device.pick("auto")


def test_the_chips_of_sophgo_are_a_list_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHIPS", "3, 5")
    assert device.sophgo_chips() == [3, 5]
    monkeypatch.setenv("CHIP_MAP", "7,6,2,3")
    assert device.sophgo_chips() == [7, 6, 2, 3]
    monkeypatch.setenv("CHIP_MAP", "a,b")
    with pytest.raises(UserError, match="'a,b'; expected numbers of chips"):
        device.sophgo_chips()


def test_the_cpu_reports_its_memory_and_dtypes() -> None:
    memory = device_memory(CPU)
    assert memory.peak > 1 << 20
    assert memory.free > 1 << 20
    assert device.compute_dtype("bf16", CPU) == (torch.bfloat16, "")
    assert device.compute_dtype("fp16", CPU)[0] == torch.float32
    assert torch.distributed.get_default_backend_for_device(CPU) == "gloo"
    device.synchronize(CPU)


def test_a_seed_holds_for_its_body_only() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with device.seeded(7, CPU):
        first = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with device.seeded(7, CPU):
        assert torch.equal(torch.rand(2), first)


LOOK = """
one, two = device.pick("auto"), device.pick("auto", 1)
backend = torch.distributed.get_default_backend_for_device(one)
print(one, two, getattr(torch, one.type).current_device(), backend)
from minillama.memory import device_memory
memory = device_memory(one)
print(memory.peak, memory.free, device.supports_bf16(one), device.synchronize(one))
module = getattr(torch, one.type)
before = module.get_rng_state()
with device.seeded(7, one):
    sampled = torch.rand(1, generator=module.generator)
    assert not torch.equal(module.get_rng_state(), before)
with device.seeded(7, one):
    assert torch.equal(torch.rand(1, generator=module.generator), sampled)
print(torch.equal(module.get_rng_state(), before))
module.is_bf16_supported = lambda: False
print(device.compute_dtype("bf16", one))
try:
    device.pick("auto", 2)
except Exception as error:
    print(type(error).__name__, error)
"""


@needs_fake
@pytest.mark.parametrize(
    ("name", "backend", "variable"),
    [
        ("npu", "hccl", "ASCEND_RT_VISIBLE_DEVICES"),
        ("mlu", "cncl", "MLU_VISIBLE_DEVICES"),
        ("tpu", "sccl", "CHIPS"),
    ],
)
def test_auto_finds_a_plugin_that_is_installed(
    name: str, backend: str, variable: str, tmp_path: Path
) -> None:
    fake_plugin(tmp_path, name)
    found = lines(run(tmp_path, LOOK))
    assert found[:4] == [
        f"{name}:0 {name}:1 1 {backend}",
        "2097152 1073741824 True None",
        "True",
        f"(torch.float32, '{name} has no bf16; using fp32 instead, at twice the memory')",
    ]
    assert found[4].startswith("UserError local rank 2 has no chip: 2 to be seen")
    assert variable in found[4]


@needs_fake
def test_auto_takes_what_torch_has_loaded_then_the_first_in_the_table(tmp_path: Path) -> None:
    for name in ("npu", "mlu"):
        fake_plugin(tmp_path / "both", name)
    modules = "'torch_npu' in sys.modules, 'torch_mlu' in sys.modules"
    report = f"import sys; print(device.pick('auto'), {modules})"
    assert lines(run(tmp_path / "both", report)) == ["npu:0 True False"]
    package(
        tmp_path / "loaded", "torch_npu", "raise AssertionError('imported beside another plug-in')"
    )
    fake_plugin(tmp_path / "loaded", "mlu", entry="torch_mlu:load")
    assert lines(run(tmp_path / "loaded", report)) == ["mlu:0 False True"]


@needs_fake
def test_each_rank_of_sophgos_gets_the_chip_of_the_ring(tmp_path: Path) -> None:
    fake_plugin(tmp_path, "tpu")
    program = """
print(device.pick('tpu', 1))
print(device.group_options(torch.device('tpu:1'), 2).chip_map)
device.pick('tpu', 2)
"""
    done = run(tmp_path, program, CHIPS="1,0")
    assert done.stdout.splitlines() == ["tpu:0", "[1, 0]"]
    assert "local rank 2 has no chip: 2 to be seen (CHIPS is 1,0); start 2 processes" in done.stderr
    assert lines(run(tmp_path, "print(device.group_options(device.pick('tpu'), 2).chip_map)")) == [
        "[0, 1]"
    ]


@pytest.mark.parametrize(
    "metadata",
    ["Home-page: https://github.com/google-pytorch/torch_tpu\n", "Requires-Dist: libtpu>=0.0.50\n"],
)
def test_googles_package_of_the_same_name_is_known_without_importing_it(
    metadata: str, tmp_path: Path
) -> None:
    package(tmp_path, "torch_tpu", "import os; os._exit(3)", metadata)
    done = run(
        tmp_path,
        "print(device.pick('auto')); torch.tpu = torch.cpu; print(device.pick('auto')); "
        "device.pick('tpu')",
    )
    assert done.stdout.splitlines() == ["cpu", "cpu"]
    assert "tpu skipped: the torch_tpu installed here is Google's" in done.stderr
    assert "device 'tpu' cannot be used: the torch_tpu installed here is Google's" in done.stderr


def test_a_plugin_that_does_not_load_is_named_with_what_to_set(tmp_path: Path) -> None:
    broken = "raise OSError('libhccl.so: cannot open shared object file')"
    package(tmp_path, "torch_npu", broken, entry="torch_npu:load")
    done = run(tmp_path, "", script="train.py --max_steps 1 --out_dir unused")
    assert done.returncode == 2
    assert done.stderr == (
        "error: torch's device plug-in torch_npu does not load (libhccl.so: cannot open shared "
        "object file); repair it, "
        "or set TORCH_DEVICE_BACKEND_AUTOLOAD=0 to continue without it\n"
    )
    done = run(
        tmp_path,
        "print(device.pick('auto')); device.pick('npu')",
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert done.stdout == "cpu\n"
    assert "npu skipped: torch_npu does not load (libhccl.so" in done.stderr
    assert "device 'npu' cannot be used: torch_npu does not load" in done.stderr


def test_a_plugin_without_a_chip_is_passed_over_aloud(tmp_path: Path) -> None:
    package(
        tmp_path,
        "torch_npu",
        "import torch, types\ntorch.npu = types.SimpleNamespace(is_available=lambda: False)",
    )
    done = run(tmp_path, "print(device.pick('auto'))", ASCEND_RT_VISIBLE_DEVICES="9")
    assert done.stdout == "cpu\n"
    assert "npu skipped: torch_npu finds no chip (ASCEND_RT_VISIBLE_DEVICES is 9)" in done.stderr


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_card_that_only_emulates_bf16_computes_in_fp32(
    native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    found, warning = device.compute_dtype("bf16", torch.device("cuda", 0))
    assert found == dtype
    assert ("cuda has no bf16" in warning) == (not native)
