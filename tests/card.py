"""The NVIDIA card that tests/test_cuda.py and test_cuda_ops.py use, or what stands in for it."""

import os

import pytest
import torch

from tests.parity import BOUNDS

DEVICE = torch.device(os.environ.get("MINILLAMA_CUDA_TESTS") or "cuda:0")
needs_device = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(),
    reason="no NVIDIA card: torch.cuda.is_available() is False",
)
needs_card = pytest.mark.skipif(DEVICE.type != "cuda", reason="the CPU does not have this")
each_dtype = pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype)[6:])
