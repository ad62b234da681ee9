"""One NVIDIA card: training, ZeRO, decoding and the scripts, beside the CPU.

    python -m pytest tests/test_cuda.py tests/test_cuda_ops.py

Skipped without a card. With `MINILLAMA_CUDA_TESTS=cpu` before the command, what can be run on the
CPU is: that tests the tests. Nothing has to be installed besides pytest, torch and the packages
that minillama itself needs.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillama import comm, memory
from minillama import device as devices
from minillama.comm import Mesh
from minillama.generation.decode import Completion, decode
from minillama.generation.sampling import Sampling
from minillama.grid import make_grid
from minillama.lora import LoraConfig, add_lora, merge_lora, resolve_names
from minillama.model import Llama
from minillama.parallel.sharded_optimizer import ShardedOptimizer
from minillama.train_config import TrainConfig
from minillama.training.model_building import recompute_activations
from minillama.training.run import prepare
from minillama.training.trainer import Trainer
from tests.card import DEVICE, needs_card, needs_device
from tests.conftest import random_model, random_tokens
from tests.runs import losses_of, small_run, weights_of

ROOT = Path(__file__).parents[1]
pytestmark = needs_device


def loss_of(model: Llama, seed: int = 0) -> Tensor:
    tokens = random_tokens(2, 32, seed=seed).to(model.lm_head.weight.device)
    return model.loss_sum(tokens, tokens.roll(-1, 1)) / 64


def gradients_of(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def test_recomputed_activations_give_the_same_gradients() -> None:
    model = random_model(dim=192, ffn_dim=512, n_layers=8, head_dim=32).to(DEVICE)
    plain = gradients_of(model, loss_of(model))
    recompute_activations(model.model.layers)
    recomputed = gradients_of(model, loss_of(model))
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def trained(zero_stage: int, precision: str, device: torch.device = DEVICE) -> list[Tensor]:
    """The weights after five steps of two micro-batches each."""
    dtype = devices.DTYPES[precision]
    model = random_model().to(device, dtype)
    settings = TrainConfig(
        zero_stage=zero_stage, precision=precision, gradient_accumulation_steps=2
    )
    optimizer = ShardedOptimizer(model.named_parameters(), make_grid(Mesh(device=device)), settings)
    for step in range(5):
        optimizer.zero_grad()
        for micro_batch in range(2):
            optimizer.backward(loss_of(model, 2 * step + micro_batch) / 2, 1)
        optimizer.step(1e-2, 1.0)
    return [parameter.detach().float().cpu() for parameter in model.parameters()]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_three_stages_of_zero_end_at_the_same_weights_on_one_rank(precision: str) -> None:
    """Stage 2 reduces in every micro-batch, and rounds to the parameters' dtype where 0 and 1 do
    not.
    """
    expected = trained(0, precision)
    tolerance = 1e-5 if precision == "fp32" else 3e-2
    for stage in (1, 2):
        for a, b in zip(trained(stage, precision), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_steps_on_the_card_are_steps_on_the_cpu() -> None:
    on_cpu = trained(0, "fp32", torch.device("cpu"))
    for a, b in zip(trained(0, "fp32"), on_cpu, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_card
def test_the_collectives_of_nccl_take_what_they_are_given(tmp_path: Path) -> None:
    """A group of one rank: the calls of comm.py, in the dtypes that it sends."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            part = torch.ones(8, dtype=dtype, device=DEVICE)
            whole = torch.empty_like(part)
            dist.all_reduce(part)
            dist.reduce(part, dst=0, async_op=True).wait()
            comm._ALL_GATHER(whole, part)
            dist.broadcast(part, src=0)
            assert torch.equal(whole, part)
        items: list[Any] = [None]
        dist.all_gather_object(items, {"step": 3})
        assert items == [{"step": 3}]
    finally:
        dist.destroy_process_group()


def greedy(model: Llama, prompts: list[list[int]]) -> list[list[int]]:
    completions = [Completion(prompt, 12) for prompt in prompts]
    with torch.inference_mode():
        for _ in decode(model, completions, Sampling(temperature=0.0), (), None):
            pass
    return [completion.ids for completion in completions]


def test_decoding_on_the_card_is_decoding_on_the_cpu() -> None:
    """One text, and a batch of different lengths with a prompt that is given twice."""
    prompts = [[1, 5, 9], [1, 7], list(range(1, 30)), [1, 5, 9]]
    model = random_model().eval()
    expected = greedy(model, prompts)
    model.to(DEVICE)
    assert greedy(model, prompts) == expected
    assert [greedy(model, [prompt])[0] for prompt in prompts] == expected


def test_sampling_with_a_seed_gives_the_same_tokens_on_both() -> None:
    model = random_model().eval()
    found = []
    for device in (torch.device("cpu"), DEVICE):
        completion = Completion([1, 5, 9], 12)
        with torch.inference_mode():
            list(decode(model.to(device), [completion], Sampling(0.7, top_k=20), (), seed=3))
        found.append(completion.ids)
    assert found[0] == found[1]


def test_a_merged_adapter_is_the_adapter_beside_its_base() -> None:
    model = random_model().to(DEVICE)
    add_lora(model, LoraConfig(rank=4, alpha=8.0, targets=resolve_names(("all",))))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    tokens = random_tokens(2, 16).to(DEVICE)
    with torch.no_grad():
        beside = model.logits(model(tokens))
        merge_lora(model)
        merged = model.logits(model(tokens))
    torch.testing.assert_close(merged, beside, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(
    inputs: Path, tmp_path: Path, recipe: str
) -> None:
    """bf16 with recomputation, through the trainer: six steps, and three steps and three more."""
    changes: dict[str, Any] = {
        "device": DEVICE.type,
        "precision": "bf16",
        "gradient_checkpointing": True,
        "save_strategy": "steps",
        "save_steps": 3,
        "lora": recipe == "lora",
        "lora_dropout": 0.1 if recipe == "lora" else 0.0,
    }
    mesh = Mesh(device=devices.pick(DEVICE.type))
    Trainer(prepare(small_run(inputs, tmp_path / "whole", **changes), mesh)).train()
    resumed = small_run(inputs, tmp_path / "resumed", **changes)
    resumed = replace(resumed, resume=str(tmp_path / "whole/checkpoints/step-000003"))
    Trainer(prepare(resumed, mesh)).train()
    expected = weights_of(tmp_path / "whole/final")
    for key, tensor in weights_of(tmp_path / "resumed/final").items():
        torch.testing.assert_close(tensor, expected[key], rtol=2e-2, atol=1e-3)
    assert losses_of(tmp_path / "whole")[-1] < losses_of(tmp_path / "whole")[0]


def test_memory_is_that_of_the_card() -> None:
    held = torch.zeros(1 << 20, device=DEVICE)
    found = memory.device_memory(DEVICE)
    assert found.peak >= held.nbytes
    assert found.free > 0
    assert memory.most_usable_bytes(DEVICE) > held.nbytes


def test_the_scripts_run_on_the_card(tmp_path: Path) -> None:
    command = [sys.executable, "generate.py", "--ckpt", "tests/golden/model"]
    command += ["--template", "llama_factory_default", "--greedy", "--max_new_tokens", "24"]
    command += ["--prompt", "Which number is larger, 31 or 62?", "--device", DEVICE.type]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "62\n"), done.stderr
