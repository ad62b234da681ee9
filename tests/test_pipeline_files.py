"""Stages read, sample and write their own tensors, and the files never show how many they were."""

import errno
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillama import comm
from minillama.checkpoint.hf_reader import empty_model, initialise, load_model
from minillama.checkpoint.hf_writer import save_model
from minillama.checkpoint.placing import loading_plan
from minillama.comm import Mesh
from minillama.grid import Grid, make_grid
from minillama.lora import LINEARS, LoraConfig, add_lora, load_adapter, save_adapter
from minillama.model import Llama
from minillama.parallel.pipeline import keep_stage
from minillama.parallel.tensor import cut_parameters
from minillama.parallel.whole import write_joined
from minillama.tensor_files import TensorRef
from minillama.tensor_writers import TensorSpecs
from tests.conftest import random_model
from tests.faults.test_peft_kinds import peft_adapter
from tests.ranks import run_on_ranks
from tests.tensor_ranks import EIGHT_HEADS

CPU = torch.device("cpu")
SHAPE = {**EIGHT_HEADS, "n_layers": 3}
GRIDS = [(1, 2), (1, 3), (2, 2)]  # tensor ranks, stages
each_grid = pytest.mark.parametrize(("tensor", "stages"), GRIDS)
each_tie = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def own_parameters(model: Llama) -> dict[str, torch.Tensor]:
    """What is not on the meta device."""
    named = model.named_parameters()
    return {name: parameter.detach() for name, parameter in named if not parameter.is_meta}


@each_tie
def test_a_stage_reads_its_tensors_and_no_others(
    tied: bool, tiny_checkpoint: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = TensorRef.read

    def noted(self: TensorRef) -> torch.Tensor:
        read.append(self.name)
        return original(self)

    path = tiny_checkpoint(**SHAPE, tie_embeddings=tied)
    whole = load_model(path)
    monkeypatch.setattr(TensorRef, "read", noted)
    found: list[str] = []
    for stage in range(3):
        read.clear()
        model = load_model(path, device_of=loading_plan(whole.config, [CPU], Mesh(stage, 3)))
        own = own_parameters(model)
        assert read == list(own)
        assert all(torch.equal(own[name], whole.get_parameter(name)) for name in own)
        found += own
    names = [name for name, _ in whole.named_parameters()]
    assert sorted(found) == sorted([*names, "model.embed_tokens.weight"] if tied else names)


def test_random_weights_and_factors_do_not_depend_on_the_number_of_stages() -> None:
    config = random_model(**SHAPE).config

    def sample(stages: Mesh) -> Llama:
        generator = torch.Generator().manual_seed(3)
        model = empty_model(config, torch.float32, loading_plan(config, [CPU], stages))
        initialise(model, generator)
        add_lora(model, LoraConfig(rank=2, targets=(*LINEARS, "lm_head")), generator)
        return model

    whole = sample(Mesh())
    found = 0
    for stage in range(3):
        own = own_parameters(sample(Mesh(stage, 3)))
        found += len(own)
        for name, parameter in own.items():
            assert torch.equal(parameter, whole.get_parameter(name)), name
    assert found == len(own_parameters(whole))


def write_from_stages(make: Callable[[], Llama], directory: Path, tensor: int, stages: int) -> None:
    with comm.start("cpu", timeout_minutes=1) as mesh:
        grid = make_grid(mesh, tensor, stages)
        model = make()
        cut_parameters(model, grid.tensor)
        keep_stage(model, grid.stage)
        about = {"made_by": "a test"}
        save_model(model, directory, about=about, mesh=grid.tensor, stages=grid.stage)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@each_grid
@each_tie
def test_a_model_written_from_stages_has_the_same_bytes(
    tied: bool, tensor: int, stages: int, tmp_path: Path
) -> None:
    make = partial(random_model, **SHAPE, tie_embeddings=tied)
    save_model(make(), tmp_path / "one", about={"made_by": "a test"})
    run_on_ranks(tensor * stages, write_from_stages, make, tmp_path / "many", tensor, stages)
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")


def copy_adapter(base: Path, adapter: Path, directory: Path, grid: Grid) -> bool:
    """Load a model with an adapter, and write the adapter; returns whether the model is tied."""
    config = load_model(base).config
    plan = loading_plan(config, [CPU], grid.stage)
    model = load_model(base, device_of=plan, mesh=grid.tensor)
    lora = load_adapter(model, adapter, mesh=grid.tensor, stages=grid.stage)
    if grid.stage.size > 1:
        keep_stage(model, grid.stage)
    save_adapter(model, lora, directory, "BASE", grid.tensor, grid.stage)
    return model.config.tie_embeddings


def copy_adapter_on_rank(
    base: Path, adapter: Path, directory: Path, tensor: int, stages: int
) -> bool:
    with comm.start("cpu", timeout_minutes=1) as mesh:
        return copy_adapter(base, adapter, directory, make_grid(mesh, tensor, stages))


def assert_copied_from_stages(base: Path, adapter: Path, tmp_path: Path) -> None:
    is_tied = copy_adapter(base, adapter, tmp_path / "one", make_grid(Mesh()))
    for tensor, stages in ((1, 3), (2, 2)):
        copy = tmp_path / f"{tensor}x{stages}"
        arguments = (base, adapter, copy, tensor, stages)
        ranks = tensor * stages
        assert run_on_ranks(ranks, copy_adapter_on_rank, *arguments) == [is_tied] * ranks
        assert files_of(copy) == files_of(tmp_path / "one")


@each_tie
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": [*LINEARS, "lm_head"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"], "rows": 61},
    ],
    ids=["every linear", "one layer", "one of each", "grown vocabulary"],
)
def test_an_adapter_of_peft_read_and_written_by_stages_has_the_same_bytes(
    settings: dict, tied: bool, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    save_model(random_model(**SHAPE, tie_embeddings=tied), base)
    peft_adapter(base, tmp_path / "peft", **settings)
    assert_copied_from_stages(base, tmp_path / "peft", tmp_path)


@each_tie
def test_stages_agree_whether_a_copy_is_changed_and_a_pair_tied(tied: bool, tmp_path: Path) -> None:
    """PEFT may save copies of the embedding and the head; here the head's first row differs."""
    base = tmp_path / "base"
    model = random_model(**SHAPE, tie_embeddings=tied)
    save_model(model, base)
    peft_adapter(base, tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    head = model.lm_head.weight.detach().clone()
    head[0] += 1.0
    tensors["base_model.model.lm_head.weight"] = head
    tensors["base_model.model.model.embed_tokens.weight"] = model.model.embed_tokens.weight
    save_file(tensors, file, {"format": "pt"})
    assert_copied_from_stages(base, tmp_path / "peft", tmp_path)


def fail_to_write() -> str:
    """The first rank's disk is full after one tensor."""

    def write(specs: TensorSpecs, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        next(tensors)
        raise OSError(errno.ENOSPC, "No space left on device")

    with comm.start("cpu", timeout_minutes=1) as mesh:
        model = random_model(**SHAPE)
        keep_stage(model, mesh)
        outcome = ""
        try:
            write_joined(dict(model.named_parameters()), Mesh(), write, mesh)
        except OSError as error:
            outcome = f"{error.strerror}; "
        ranks = comm.gather_objects(mesh, mesh.rank)
        return f"{outcome}next: {ranks}"


def test_a_full_disk_leaves_no_stage_waiting() -> None:
    first, second = run_on_ranks(2, fail_to_write)
    assert first == "No space left on device; next: [0, 1]"
    assert second == "next: [0, 1]"
