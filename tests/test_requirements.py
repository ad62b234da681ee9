"""The lowest Python and torch: one number each, and one line for whoever has less."""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch

from minillama import cli, device, requirements
from minillama.errors import UserError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("version", ["1.11.0", "2.1.0.post3", "2.6.0+cu124", "2.6.0a0+git7b1ef2f"])
def test_an_older_torch_is_refused_before_it_is_imported(
    version: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda arguments: pytest.fail("the script was started"), [])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: torch {version}: minillama needs 2.7 or newer")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("version", ["2.7.0", "2.10.0+cu128", "2.13.0", "3.0", "unknown"])
def test_this_torch_and_newer_ones_are_accepted(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    requirements.refuse_old_torch()


def test_ranks_on_the_cpu_that_could_hang_when_they_end_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "2.7.1+cu126")
    with pytest.raises(UserError, match=r"torch 2\.7\.1\+cu126 can hang .* use torch 2\.10"):
        device.group_options(torch.device("cpu"), 2)
    assert device.group_options(torch.device("cuda", 0), 2) is None
    monkeypatch.setattr(metadata, "version", lambda name: "2.10.0")
    assert device.group_options(torch.device("cpu"), 2) is None


def test_a_missing_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(UserError, match=r"torch is not installed.*docs/install\.md"):
        requirements.refuse_old_torch()


def test_an_older_python_gets_one_line_and_exit_code_2() -> None:
    program = "import sys; sys.version_info = (3, 9, 18, 'final', 0); import minillama"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: Python 3.11 or newer is needed; this is 3.9\n"


def test_pyproject_names_the_same_versions() -> None:
    torch = ".".join(str(part) for part in requirements.LOWEST_TORCH)
    assert f"torch>={torch}" in PROJECT["dependencies"]
    assert PROJECT["requires-python"] == ">=3.11"
    source = (ROOT / "minillama/__init__.py").read_text(encoding="utf-8")
    assert "sys.version_info < (3, 11)" in source
