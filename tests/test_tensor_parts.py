"""Ranks read, sample and write their parts of a model, and the files never show how many they were.

Loading and sampling need no message, so one process does it here for one rank after the other.
"""

import errno
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillama import comm
from minillama.checkpoint.hf_reader import empty_model, initialise, load_model
from minillama.checkpoint.hf_writer import save_model, write_weights
from minillama.comm import Mesh
from minillama.errors import UserError
from minillama.lora import LINEARS, LoraConfig, add_lora, load_adapter, save_adapter
from minillama.model import Llama
from minillama.parallel.shards import axis_of, cut, join
from minillama.parallel.tensor import cut_parameters
from minillama.parallel.whole import write_joined
from minillama.tensor_files import TensorRef
from minillama.tensor_writers import TensorSpecs, specs_of
from tests.conftest import random_model
from tests.faults.test_peft_kinds import peft_adapter
from tests.ranks import run_on_ranks
from tests.tensor_ranks import EIGHT_HEADS

EVERYTHING = LoraConfig(rank=2, targets=(*LINEARS, "lm_head"))


def parameters_of(model: Llama) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_parts(make_part: Callable[[Mesh], Llama], whole: Llama, size: int) -> None:
    """The models that ranks make hold the parts of the whole, to the bit."""
    models = [parameters_of(make_part(Mesh(rank, size))) for rank in range(size)]
    expected = parameters_of(whole)
    assert models[0].keys() == expected.keys()
    for name, tensor in expected.items():
        axis = axis_of(name)
        for rank, model in enumerate(models):
            assert torch.equal(model[name], cut(tensor, axis, rank, size)), (name, rank)
        assert torch.equal(join([model[name] for model in models], axis), tensor), name


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("vocab_size", [0, 61], ids=["", "grown vocabulary"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_rank_reads_its_part_of_each_tensor(
    tied: bool, vocab_size: int, size: int, tiny_checkpoint: Callable
) -> None:
    """New rows of the vocabulary are the mean of all old ones, wherever those are."""
    path = tiny_checkpoint(**EIGHT_HEADS, tie_embeddings=tied, attention_bias=True, mlp_bias=True)
    load = partial(load_model, path, torch.bfloat16, vocab_size=vocab_size)
    assert_parts(lambda mesh: load(mesh=mesh), load(), size)


def test_a_rank_reads_its_part_of_files_of_torch_too(tmp_path: Path) -> None:
    model = random_model(**EIGHT_HEADS)
    save_model(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tensors = parameters_of(model)
    write_weights(tmp_path, iter(tensors.items()), specs_of(tensors), bin=True)
    assert_parts(lambda mesh: load_model(tmp_path, mesh=mesh), model, 4)


def test_no_rank_reads_what_another_one_holds(
    tiny_checkpoint: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The elements that four ranks read: a quarter of each tensor that is cut, and the norms."""
    elements = 0
    original = TensorRef._copy

    def counted(self: TensorRef, mapped: torch.Tensor) -> torch.Tensor:
        nonlocal elements
        elements += mapped.numel()
        return original(self, mapped)

    path = tiny_checkpoint(**EIGHT_HEADS, vocab_size=48)
    monkeypatch.setattr(TensorRef, "_copy", counted)
    model = load_model(path, mesh=Mesh(3, 4))
    whole = model.config.parameter_count()
    norms = (2 * model.config.n_layers + 1) * model.config.dim
    assert elements == norms + (whole - norms) / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_and_factors_do_not_depend_on_the_number_of_ranks(
    dtype: torch.dtype,
) -> None:
    config = random_model(**EIGHT_HEADS, attention_bias=True, mlp_bias=True).config

    def sample(mesh: Mesh) -> Llama:
        generator = torch.Generator().manual_seed(3)
        model = empty_model(config, dtype, mesh=mesh)
        initialise(model, generator, mesh)
        add_lora(model, EVERYTHING, generator, mesh)
        return model

    expected = Llama(config).initialise(torch.Generator().manual_seed(3)).to(dtype)
    for name, parameter in expected.named_parameters():
        assert torch.equal(sample(Mesh()).get_parameter(name), parameter), name
    for size in (2, 4):
        assert_parts(sample, sample(Mesh()), size)


def write_from_parts(make: Callable[[], Llama], directory: Path) -> None:
    """Cut a model over the ranks, and write it from its parts."""
    with comm.start("cpu", timeout_minutes=1) as mesh:
        model = make()
        cut_parameters(model, mesh)
        save_model(model, directory, about={"made_by": "a test"}, mesh=mesh)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_written_from_parts_has_the_same_bytes(
    tied: bool, size: int, tmp_path: Path
) -> None:
    """A vocabulary of 50, which neither four nor eight ranks divide."""
    make = partial(random_model, **EIGHT_HEADS, tie_embeddings=tied)
    save_model(make(), tmp_path / "one", about={"made_by": "a test"})
    run_on_ranks(size, write_from_parts, make, tmp_path / "many")
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def copy_adapter(base: Path, adapter: Path, directory: Path, mesh: Mesh) -> list[tuple]:
    """Load a model with an adapter, and write the adapter.

    Returns the model's parameters, and whether they are trained.
    """
    model = load_model(base, mesh=mesh)
    config = load_adapter(model, adapter, mesh=mesh)
    save_adapter(model, config, directory, "BASE", mesh)
    return [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]


def copy_adapter_on_rank(base: Path, adapter: Path, directory: Path) -> list[tuple]:
    with comm.start("cpu", timeout_minutes=1) as mesh:
        return copy_adapter(base, adapter, directory, mesh)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": [*LINEARS, "lm_head"]},
        {"target_modules": ["embed_tokens", "o_proj", "down_proj"]},
        {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"], "rows": 61},
    ],
    ids=["every linear", "embedding", "whole", "one of each", "grown vocabulary"],
)
def test_an_adapter_of_peft_read_and_written_in_parts_has_the_same_bytes(
    settings: dict, tied: bool, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    save_model(random_model(**EIGHT_HEADS, tie_embeddings=tied), base)
    peft_adapter(base, tmp_path / "peft", **settings)
    parameters = copy_adapter(base, tmp_path / "peft", tmp_path / "one", Mesh())
    arguments = (base, tmp_path / "peft", tmp_path / "many")
    assert run_on_ranks(4, copy_adapter_on_rank, *arguments) == [parameters] * 4
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_row_that_one_rank_has_decides_for_all_whether_a_copy_is_changed_and_a_pair_tied(
    tied: bool, tmp_path: Path
) -> None:
    """PEFT may save copies of the embedding and the head; here the head's first row differs."""
    base = tmp_path / "base"
    model = random_model(**EIGHT_HEADS, tie_embeddings=tied)
    save_model(model, base)
    peft_adapter(base, tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    head = model.lm_head.weight.detach().clone()
    head[0] += 1.0
    tensors["base_model.model.lm_head.weight"] = head
    tensors["base_model.model.model.embed_tokens.weight"] = model.model.embed_tokens.weight
    save_file(tensors, file, {"format": "pt"})
    parameters = copy_adapter(base, tmp_path / "peft", tmp_path / "one", Mesh())
    arguments = (base, tmp_path / "peft", tmp_path / "many")
    assert run_on_ranks(4, copy_adapter_on_rank, *arguments) == [parameters] * 4
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")


def fail_to_write() -> str:
    """The first rank's disk is full after one tensor."""

    def write(specs: TensorSpecs, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        next(tensors)
        raise OSError(errno.ENOSPC, "No space left on device")

    with comm.start("cpu", timeout_minutes=1) as mesh:
        model = random_model(**EIGHT_HEADS)
        cut_parameters(model, mesh)
        outcome = ""
        try:
            write_joined(dict(model.named_parameters()), mesh, write)
        except OSError as error:
            outcome = f"{error.strerror}; "
        first, second = comm.gather_objects(mesh, mesh.rank)
        return f"{outcome}next: {first}, {second}"


def test_a_rank_that_cannot_write_leaves_no_other_waiting() -> None:
    """Both take part in what comes next."""
    assert run_on_ranks(2, fail_to_write) == ["No space left on device; next: 0, 1", "next: 0, 1"]


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 4, "n_heads = 6 cannot be cut over 4 tensor-parallel ranks; use 1 or 3"),
        ({"n_heads": 8, "n_kv_heads": 4}, 8, "n_kv_heads = 4 cannot be cut over 8"),
        ({"ffn_dim": 41}, 3, "ffn_dim = 41 cannot be cut over 3 .*; use 1"),
        (EIGHT_HEADS | {"vocab_size": 3}, 4, "vocab_size = 3 cannot be cut over 4"),
    ],
)
def test_a_model_that_the_ranks_cannot_divide_is_refused(
    changes: dict, size: int, message: str, tiny_checkpoint: Callable
) -> None:
    with pytest.raises(UserError, match=message):
        load_model(tiny_checkpoint(**changes), mesh=Mesh(0, size))
