"""The real torch_npu, without a chip, checks a whole training step of ours.

It does so by its own schemas, shape functions and autograd formulas.

Under FakeTensorMode a tensor has a shape, a dtype and a device but no numbers. Names, keywords,
arities, dtypes and shapes of our calls, and that each op in training has a gradient, are checked by
Huawei's code; values and limits of shape are not (`test_npu.py` has those). Needs an environment of
its own with CANN's place taken by `cann_stub.py`; CONTRIBUTING.md has the commands. Skips
elsewhere.
"""

import importlib.util
from collections import Counter
from typing import Any

import pytest
import torch

if importlib.util.find_spec("torch_npu") is None:
    pytest.skip("torch_npu is not installed", allow_module_level=True)

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from minillama import device, ops
from minillama.memory import device_memory
from minillama.model import Llama
from minillama.ops import Documents, npu
from tests.conftest import TINY
from tests.vendor.ascend import KERNELS, SCHEMAS

NPU = torch.device("npu", 0)


class Count(TorchDispatchMode):
    """The kernels of torch_npu that are called in the body."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if str(function).startswith("npu."):
            self.calls[function._opname] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def a_triangle_of_each_mode() -> None:
    npu._triangle.cache_clear()


def test_the_plugin_is_found_and_its_kernels_come_first() -> None:
    assert device.pick("auto") == NPU
    assert torch.distributed.get_default_backend_for_device(NPU) == "hccl"
    assert device_memory(NPU).free
    ops.choose("auto")
    assert {name: op.usable("npu")[0].name for name, op in ops.TABLE.items()} == {
        "rms_norm": "npu",
        "rope": "npu",
        "swiglu": "npu",
        "scaled_masked_softmax": "npu",
        "linear": "fused",
        "attention": "npu",
        "linear_cross_entropy": "fused",
        "adamw": "npu",
    }


@pytest.mark.parametrize("documents", [None, [5, 7]], ids=["one text", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_passes_its_schemas_shapes_and_gradients(
    documents: list[int] | None, dtype: torch.dtype
) -> None:
    ops.choose("auto")
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device(NPU):
            model = Llama(TINY)
        for module in model.modules():  # Module.to would swap fake tensors, which it cannot
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(parameter.detach().to(dtype)))
        tokens = labels = torch.zeros(1, 12, dtype=torch.int64, device=NPU)
        packed = Documents(documents, NPU) if documents else None
        with Count() as forward:
            hidden = model(tokens, packed)
        with (
            Count() as backward
        ):  # the fused loss picks the labelled positions by numbers, which are not there
            ops.reference.linear_cross_entropy(hidden, model.lm_head.weight, labels).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            assert (parameter.grad.shape, parameter.grad.dtype, parameter.grad.device) == (
                parameter.shape,
                dtype,
                NPU,
            )
            with Count() as update:
                ops.adamw(
                    parameter.data,
                    parameter.grad,
                    torch.zeros_like(parameter),
                    torch.zeros_like(parameter),
                    1,
                    learning_rate=1e-3,
                    beta1=0.9,
                    beta2=0.99,
                    epsilon=1e-8,
                    weight_decay=0.0,
                )
    L = TINY.n_layers
    assert forward.calls == {
        "npu_rms_norm": 2 * L + 1,
        "npu_rotary_mul": 2 * L,
        "npu_fusion_attention": L,
        "npu_swiglu": L,
    }
    assert backward.calls == {
        "npu_rms_norm_backward": 2 * L + 1,
        "npu_rotary_mul_backward": 2 * L,
        "npu_fusion_attention_grad": L,
        "npu_swiglu_backward": L,
    }
    assert update.calls == {"npu_apply_adam_w": 1}


@pytest.mark.parametrize(
    ("T", "kernel"),
    [
        (9, "npu_prompt_flash_attention"),
        (3, "npu_prompt_flash_attention"),
        (1, "npu_incre_flash_attention"),
    ],
)
def test_inference_passes_its_schemas_and_shapes(T: int, kernel: str) -> None:
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (
            torch.zeros(2, n, heads, 16, dtype=torch.float16, device=NPU)
            for n, heads in ((T, 6), (9, 3), (9, 3))
        )
        assert npu.can_attention(q, k, v)
        with Count() as count:
            y = npu.attention(q, k, v)
    assert count.calls == {kernel: 1}
    assert (y.shape, y.dtype) == (q.shape, q.dtype)


def test_the_softmax_passes_its_schema_shape_and_gradient() -> None:
    with FakeTensorMode():
        x = torch.zeros(1, 2, 32, 64, device=NPU, requires_grad=True)
        y = npu.scaled_masked_softmax(x, torch.zeros(32, 64, dtype=torch.bool, device=NPU), 0.5)
        y.sum().backward()
    assert y.shape == x.shape == x.grad.shape


def test_the_emulation_has_the_installed_plugins_schemas() -> None:
    """Except for the name of the first argument, which we never use.

    It is `self` in the plug-in's list, and `input` as npu_rms_norm registers it.
    """
    for name in KERNELS:
        op, _, overload = name.partition(".")
        true, ours = (
            getattr(getattr(torch.ops.npu, op), overload or "default")._schema,
            torch._C.parse_schema(SCHEMAS[name]),
        )
        described = [
            [
                (a.name if i else "", str(a.type), a.default_value, a.kwarg_only)
                for i, a in enumerate(schema.arguments)
            ]
            for schema in (true, ours)
        ]
        assert described[0] == described[1], name
        assert [str(r.type) for r in true.returns] == [str(r.type) for r in ours.returns], name


def test_wrong_calls_are_refused_by_the_plugin_itself() -> None:
    with FakeTensorMode():
        x, w = torch.zeros(2, 8, device=NPU), torch.zeros(8, device=NPU)
        for wrong in (
            lambda: torch.ops.npu.npu_rms_norm(x, w, eps=1e-5),
            lambda: torch.ops.npu.npu_swiglu(x, x, -1),
            lambda: torch.ops.npu.npu_fusion_attention(x, x, x, 1, "BSH", pre_tokens=1),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
