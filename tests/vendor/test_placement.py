"""One model over a fake NPU and the CPU, as `run_placement.py` runs it, beside the CPU alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minillama.checkpoint.hf_writer import save_model
from minillama.lora import LoraConfig, add_lora, save_adapter
from minillama.model import Llama
from tests.conftest import random_model
from tests.runs import write_inputs
from tests.vendor import fake_device
from tests.vendor.run_placement import CASES, ORDERS, Case, complete, loss_and_gradients, train_on
from tests.vendor.test_full_path import ROOT

pytestmark = pytest.mark.skipif(
    not fake_device.is_possible(), reason="this torch has no pure-Python back ends"
)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Llama]:
    """A folder with a model, an adapter and the inputs of a run; model and adapter on the CPU."""
    folder = tmp_path_factory.mktemp("placement")
    (folder / "inputs").mkdir()
    write_inputs(folder / "inputs")
    model = random_model()
    save_model(model, folder / "base")
    config = LoraConfig(rank=2)
    generator = torch.Generator().manual_seed(1)
    add_lora(model, config, generator)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    save_adapter(model, config, folder / "adapter", str(folder / "base"))
    return folder, model


@pytest.fixture(scope="module")
def found(adapted: tuple[Path, Llama]) -> dict:
    folder, _ = adapted
    command = [sys.executable, "-m", "tests.vendor.run_placement", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_are_those_of_one_device(case: Case, found: dict) -> None:
    gradients = found["trained"][CASES.index(case)]
    expected = loss_and_gradients(case._replace(order=""))
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            torch.tensor(gradients[name]), torch.tensor(value), rtol=1e-4, atol=1e-5, msg=name
        )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_tokens_are_those_of_one_device(order: str, is_tied: bool, found: dict) -> None:
    expected = complete(random_model(n_layers=3, tie_embeddings=is_tied))
    assert found["completed"][f"{order} {is_tied}"] == expected


@pytest.mark.parametrize("order", ORDERS[:2])
@pytest.mark.parametrize("scratch", [False, True], ids=["pretrained", "scratch"])
def test_a_run_has_the_losses_of_one_device(
    order: str, scratch: bool, adapted: tuple[Path, Llama], found: dict
) -> None:
    folder, _ = adapted
    expected = train_on("cpu", folder, scratch)
    assert found["runs"][f"{order} {scratch}"] == pytest.approx(expected, rel=1e-5)


def test_a_run_goes_on_with_its_layers_on_other_devices(
    adapted: tuple[Path, Llama], found: dict
) -> None:
    folder, _ = adapted
    assert found["moved"] == pytest.approx(train_on("cpu", folder, scratch=False), rel=1e-5)


def test_each_tensor_is_loaded_straight_to_its_device(found: dict) -> None:
    for name, device in found["loaded"].items():
        is_first = name.startswith(("model.embed_tokens", "model.layers.0"))
        assert device == ("npu:0" if is_first else "cpu"), name


def test_an_adapter_opens_on_the_devices_of_its_layers(
    adapted: tuple[Path, Llama], found: dict
) -> None:
    _, model = adapted
    assert found["opened"] == complete(model)
