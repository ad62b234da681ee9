"""The doctor: right answers end with 0, a wrong one ends with 1 and is named."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minillama import doctor, ops, self_test
from minillama.errors import UserError
from minillama.ops import Implementation, Op, reference
from tests.vendor import fake_device


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    ops.choose("")


def test_every_op_has_a_case() -> None:
    assert {case.name.partition(",")[0] for case in self_test.cases()} == set(ops.TABLE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cpu_computes_every_op_right(dtype: str, capsys: pytest.CaptureFixture) -> None:
    assert doctor.main(["--device", "cpu", "--dtype", dtype]) == 0
    told = capsys.readouterr().out
    assert f"torch {metadata.version('torch')}" in told
    assert "device: cpu, collectives gloo" in told
    assert "every answer is right" in told
    rows = [line.split() for line in told.splitlines()]
    assert ["rms_norm", "fused"] in [row[:2] for row in rows]
    assert all("ok" in row for row in rows if row and row[0] in ops.TABLE)


def test_the_formulas_err_by_nothing(capsys: pytest.CaptureFixture) -> None:
    assert doctor.main(["--device", "cpu", "--ops", "reference"]) == 0
    told = capsys.readouterr().out
    assert "error 0.0e+00" in told
    assert "fused" not in told


def forgets_epsilon(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return reference.rms_norm(x, weight, 1e-6)


def swapped(gate: Tensor, up: Tensor) -> Tensor:
    return reference.swiglu(up, gate)


def not_a_number(q: Tensor, k: Tensor, v: Tensor, documents: ops.Documents | None = None) -> Tensor:
    return reference.attention(q, k, v, documents) * torch.nan


@pytest.mark.parametrize(
    ("op", "wrong", "named"),
    [
        ("rms_norm", forgets_epsilon, "wrong: rms_norm"),
        ("swiglu", swapped, "wrong: swiglu"),
        (
            "attention",
            not_a_number,
            "wrong: attention, attention, packed, attention, cached, attention, one query",
        ),
    ],
)
def test_a_wrong_answer_is_named_and_ends_with_1(
    op: str,
    wrong: object,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setitem(
        ops.TABLE,
        op,
        Op(
            op, Implementation("broken", wrong), Implementation("reference", getattr(reference, op))
        ),
    )
    assert doctor.main(["--device", "cpu"]) == 1
    told = capsys.readouterr().out
    assert "WRONG" in told
    assert named in told


def test_a_wrong_model_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(
        ops.swiglu,
        "implementations",
        (Implementation("broken", swapped), *ops.swiglu.implementations),
    )
    assert doctor.main(["--device", "cpu"]) == 1
    assert "wrong: the model, swiglu" in capsys.readouterr().out


def test_a_device_that_is_not_here_is_one_line_after_what_is(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match="device 'mlu' cannot be used"):
        doctor.main(["--device", "mlu"])
    assert "not here: torch_npu" in capsys.readouterr().out


@pytest.mark.skipif(not fake_device.is_possible(), reason="this torch has no pure-Python back ends")
def test_the_doctor_sees_a_device_and_its_vendors_kernels() -> None:
    program = (
        "from tests.vendor import fake_device; fake_device.install('npu'); "
        "from minillama import doctor; "
        "raise SystemExit(doctor.main([]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"ASCEND_RT_VISIBLE_DEVICES": "0,1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "device: npu:0, collectives hccl" in done.stdout
    assert "ASCEND_RT_VISIBLE_DEVICES=0,1" in done.stdout
    forms = dict(
        line.split()[:2]
        for line in done.stdout.splitlines()
        if line.split() and line.split()[0] in ops.TABLE
    )
    assert forms == {
        "rms_norm": "npu",
        "rope": "npu",
        "swiglu": "npu",
        "scaled_masked_softmax": "npu",
        "linear": "fused",
        "attention": "npu",
        "linear_cross_entropy": "fused",
        "adamw": "npu",
    }
