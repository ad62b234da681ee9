"""Train, save, resume, generate and shard on each fake device, beside the CPU.

`run_everything.py` does it, in a process for each device.

It proves the plumbing: that everything is on the device when it should be and on the host when it
is saved, that the vendor's kernels are the ones that run, and that collectives get tensors of the
device. The numbers come from emulated kernels, so they say nothing of the chip.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TEXTS, random_model, save_model, train_tokenizer
from tests.vendor import fake_device

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not fake_device.is_possible(), reason="this torch has no pure-Python back ends"
)
TRAINED_BY = {
    "npu": {
        "npu_rms_norm",
        "npu_rotary_mul",
        "npu_swiglu",
        "npu_fusion_attention",
        "npu_apply_adam_w.out",
    },
    "mlu": {"fused_adam"},
    "tpu": {"rmsnorm_forward", "rmsnorm_backward"},
}
WRITTEN_BY = {
    "npu": {
        "npu_rms_norm",
        "npu_rotary_mul",
        "npu_swiglu",
        "npu_prompt_flash_attention",
        "npu_incre_flash_attention",
    },
    "mlu": {"fused_rms_norm", "active"},
    "tpu": {"rmsnorm_forward"},
}  # in 16 bits


def run(device: str, folder: Path, checkpoint: Path) -> dict:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(train_tokenizer(TEXTS * 3, 400))
    variables = {"MINILLAMA_DEVICE": device} | ({"CHIPS": "1,0"} if device == "tpu" else {})
    done = subprocess.run(
        [sys.executable, "-m", "tests.vendor.run_everything", device, str(folder), str(checkpoint)],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    save_model(random_model(vocab_size=400, dim=96, head_dim=16), path)
    return path


@pytest.fixture(scope="module")
def on_the_processor(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> dict:
    return run("cpu", tmp_path_factory.mktemp("cpu") / "run", checkpoint)


@pytest.mark.parametrize("device", ["npu", "mlu", "tpu"])
def test_a_device_trains_resumes_shards_and_writes_as_the_processor_does(
    device: str, tmp_path: Path, checkpoint: Path, on_the_processor: dict
) -> None:
    right, found = on_the_processor["one"], run(device, tmp_path / "run", checkpoint)
    for trained in (found["one"], *found["ranks"]):  # one rank, and two at ZeRO stages 1 and 2
        assert trained["losses"] == pytest.approx(right["losses"], rel=1e-6)
        assert trained["eval_loss"] == pytest.approx(right["eval_loss"], rel=1e-6)
        assert set(trained["kernels"]) == TRAINED_BY[device]
        assert trained["peak"]
    assert found["resumed"] == found["one"]["losses"]
    assert found["text"]["ids"] == on_the_processor["text"]["ids"]
    assert set(found["text16"]["kernels"]) == WRITTEN_BY[device]
