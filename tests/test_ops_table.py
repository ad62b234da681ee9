"""The table of ops: which implementation a call runs, what can be chosen, and what is logged."""

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from minillama import ops
from minillama.errors import UserError
from minillama.ops import Implementation, Op, fused_attention, fused_elementwise, reference


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MINILLAMA_OPS", raising=False)
    yield
    monkeypatch.undo()
    ops.choose("")


def function_for(spec: str, op: str) -> object:
    ops.choose(spec)
    return ops.TABLE[op].usable("cpu")[0].function


def test_a_spec_chooses_all_ops_or_some() -> None:
    assert function_for("reference", "attention") is reference.attention
    assert function_for("auto", "attention") is fused_attention.attention
    assert function_for("rms_norm=reference,adamw=fused", "rms_norm") is reference.rms_norm
    assert function_for("rms_norm=reference,adamw=fused", "attention") is fused_attention.attention


def test_a_choice_for_all_leaves_ops_that_lack_it_to_the_table() -> None:
    lacks = Op("lacks", Implementation("reference", reference.swiglu))
    lacks.choose("fused")
    assert lacks.usable("cpu")[0].name == "reference"


def test_the_environment_chooses_where_no_flag_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINILLAMA_OPS", "reference")
    assert function_for("", "rms_norm") is reference.rms_norm
    assert function_for("fused", "rms_norm") is fused_elementwise.rms_norm


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("fusd", "'fusd'"),
        ("rmsnorm=fused", "did you mean 'rms_norm'"),
        ("adamw=fast", "adamw='fast'"),
        ("adamw=fused,rope", "rope=''"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_by_name(spec: str, named: str) -> None:
    with pytest.raises(UserError, match="MINILLAMA_OPS") as error:
        ops.choose(spec)
    assert named in str(error.value)


@pytest.mark.parametrize("spec", ["npu", "rms_norm=npu", "adamw=mlu"])
def test_a_chosen_kernel_of_another_device_is_an_error_at_its_first_call(
    spec: str,
) -> None:
    ops.choose(spec)
    op = "adamw" if "adamw" in spec else "rms_norm"
    with pytest.raises(UserError, match=f"{op}=... cannot be used on cpu"):
        ops.TABLE[op](torch.zeros(3, 4), torch.zeros(4), 1e-5)


def test_vendors_kernels_come_first_and_the_formula_last_and_takes_everything() -> None:
    for op in ops.TABLE.values():
        assert op.implementations[-1].name == "reference"
        assert op.implementations[-1].supports is None
        general = [bool(implementation.device) for implementation in op.implementations]
        assert general == sorted(general, reverse=True), op.name


def short(x: Tensor) -> Tensor:
    return x + 1


def any_length(x: Tensor) -> Tensor:
    return x + 2


def test_an_implementation_runs_what_it_supports_and_each_change_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = []
    op = Op(
        "add",
        Implementation(
            "short", short, "cpu", lambda: asked.append("available") or True, lambda x: len(x) < 3
        ),
        Implementation("reference", any_length),
    )
    op.choose("auto")
    with caplog.at_level(logging.INFO, "minillama.ops"):
        found = [float(op(torch.zeros(n))[0]) for n in (2, 2, 5, 2, 5)]
    assert found == [1.0, 1.0, 2.0, 1.0, 2.0]
    assert asked == ["available"]
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "op add on cpu: short"),
        ("WARNING", "op add on cpu: reference takes a call that short does not"),
    ]


def test_a_chosen_implementation_that_does_not_take_a_call_is_an_error_and_not_replaced() -> None:
    op = Op(
        "add",
        Implementation("short", short, supports=lambda x: len(x) < 3),
        Implementation("reference", any_length),
    )
    op.choose("short")
    assert float(op(torch.zeros(2))[0]) == 1.0
    with pytest.raises(UserError, match=r"add=short does not take \(5,\) torch.float32"):
        op(torch.zeros(5))


def test_a_kernel_that_fails_is_an_error_and_not_a_reason_to_try_the_next() -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("the kernel stopped")

    op = Op("add", Implementation("fails", fails), Implementation("reference", any_length))
    op.choose("auto")
    with pytest.raises(RuntimeError, match="the kernel stopped"):
        op(torch.zeros(2))


def test_an_implementation_that_is_not_available_is_passed_over() -> None:
    op = Op(
        "add",
        Implementation("short", short, available=lambda: False),
        Implementation("reference", any_length),
    )
    op.choose("auto")
    assert float(op(torch.zeros(2))[0]) == 2.0


def test_on_a_cpu_nothing_is_asked_at_a_call() -> None:
    """The first implementation of every op supports all arguments there."""
    ops.choose("auto")
    for op in ops.TABLE.values():
        assert op.usable("cpu")[0].supports is None, op.name
