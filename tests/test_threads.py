"""CPU threads: the number follows the model and the machine, and OpenMP waits as the user chose."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minillama import threads
from minillama.threads import PARAMETERS_PER_THREAD, choose_num_threads, cpu_quota

ROOT = Path(__file__).parents[1]
BILLION = 10**9


def in_new_process(program: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name not in threads.WAITING}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_importing_minillama_leaves_the_environment_alone() -> None:
    program = """
import os, pkgutil, torch, minillama
before = dict(os.environ)
for module in pkgutil.walk_packages(minillama.__path__, "minillama."):
    if module.name != "minillama.ops.triton":  # needs the extra
        __import__(module.name)
assert os.environ == before
"""
    in_new_process(program)


def test_openmp_reads_what_the_scripts_set() -> None:
    """libgomp prints its settings when it is loaded; other OpenMP libraries print their own way."""
    program = "from minillama import threads; threads.prepare_environment(); import torch"
    settings = in_new_process(program, OMP_DISPLAY_ENV="true").stderr
    if "OMP_WAIT_POLICY" not in settings:
        pytest.skip("this torch has another OpenMP library")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in settings


@pytest.mark.parametrize("name", threads.WAITING)
def test_a_choice_of_the_user_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in threads.WAITING:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "active")
    threads.prepare_environment()
    assert [os.environ.get(other) for other in threads.WAITING].count(None) == 2


@pytest.mark.parametrize(
    ("parameters", "ranks", "cores", "requested", "expected"),
    [
        (PARAMETERS_PER_THREAD // 4, 1, 8, "", 1),  # a tiny model gains nothing from two threads
        (PARAMETERS_PER_THREAD * 3, 1, 8, "", 3),
        (BILLION, 1, 8, "", 8),
        (BILLION, 1, 8, "2", 2),  # the user's choice
        (BILLION, 1, 8, "1", 1),
        (BILLION, 4, 8, "1", 2),  # torchrun's 1: the ranks share the cores
        (BILLION, 4, 2, "1", 1),
        (BILLION, 4, 8, "3", 3),
    ],
)
def test_threads_follow_the_model_and_the_cores_of_a_rank(
    parameters: int,
    ranks: int,
    cores: int,
    requested: str,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", requested)
    monkeypatch.setattr(threads, "available_cores", lambda: cores)
    assert choose_num_threads(parameters, ranks) == expected


def test_cores_are_at_most_the_cpus_of_this_process() -> None:
    assert 1 <= threads.available_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, math.inf),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n", "pod/cpu.max": "200000 100000\n"}, 2),
        ({"pod/cpu.max": "400000 100000\n", "pod/box/cpu.max": "max 100000\n"}, 4),
        ({"other/cpu.max": "100000 100000\n"}, math.inf),
    ],
    ids=str,
)
def test_the_quota_of_a_container_is_the_smallest_on_its_way(
    files: dict[str, str], quota: float, tmp_path: Path
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("1:cpu:/elsewhere\n0::/pod/box\n")
    for name, content in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert cpu_quota(tmp_path) == quota


def test_a_command_uses_as_many_threads_as_its_model_pays_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(threads, "available_cores", lambda: 8)
    before = torch.get_num_threads()
    try:
        threads.use_threads_for(PARAMETERS_PER_THREAD * 2)
        assert torch.get_num_threads() == 2
        threads.use_threads_for(1000)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_doctor_chooses_how_threads_wait_before_torch_is_loaded() -> None:
    program = """
import os, runpy, sys
from minillama import cli, doctor
assert "torch" not in sys.modules
cli.run = lambda main, arguments: None
runpy.run_module("minillama.doctor", run_name="__main__")
assert "torch" not in sys.modules and os.environ["OMP_WAIT_POLICY"] == "passive"
"""
    in_new_process(program)
