"""The optimizer's state on the disk: found by name, whichever grid of ranks wrote it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minillama import comm
from minillama.checkpoint import train_state
from minillama.checkpoint.optimizer_files import SavedOptimizer, write_slice
from minillama.checkpoint.run_directory import checkpoint_path
from minillama.errors import UserError
from minillama.files import read_json, sha256_of, write_json
from minillama.grid import make_grid
from minillama.parallel.parts import Part, SavedPiece, WholeParameter
from minillama.parallel.sharded_optimizer import SavedSlice
from minillama.tensor_files import TensorRef, read_safetensors
from minillama.tensor_writers import write_safetensors
from minillama.train_config import TrainConfig
from tests.ranks import run_on_ranks
from tests.state_runs import STEPS, fingerprint, train_here
from tests.test_optimizer_grid import SHAPES, STAGES, make_optimizer, take_step

PARAMETERS = {name: WholeParameter(shape, torch.float32) for name, shape in SHAPES.items()}
VECTORS = ("master", "m", "v")


def whole_state(directory: Path, parameters: Mapping[str, WholeParameter]) -> dict[str, Tensor]:
    """Everything that is saved, by parameter and vector."""
    saved = SavedOptimizer(directory, parameters)
    state = {}
    for name, parameter in parameters.items():
        for vector in VECTORS:
            part = Part(name, parameter.shape)
            state[f"{name} {vector}"] = saved.read(part, vector, 0, parameter.size)
    return state


def resume_and_save(
    tensor: int, stages: int, stage: int, exact: bool, loaded: Path | None, target: Path
) -> None:
    """Load a state, or make one in two steps, and save it from this grid."""
    torch.set_num_threads(1)
    with comm.start("cpu", timeout_minutes=1) as mesh:
        grid = make_grid(mesh, tensor, stages)
        names = STAGES[stages][grid.stage.rank] if stages > 1 else list(SHAPES)
        named, optimizer = make_optimizer(grid, names, stage, tied=True, exact=exact)
        if loaded is None:
            for step in (1, 2):
                take_step(grid, named, optimizer, step, tied=True)
        else:
            saved = SavedOptimizer(loaded, optimizer.parameters)
            optimizer.load_state(saved.read, 2, None)
            for vector in optimizer.vectors:
                weights = vector.weights[vector.update_range]
                assert torch.equal(weights, vector.master)
        slices = optimizer.state().slices
        problem = train_state.save_state(target, 1, mesh, slices, {}, lambda _: None, keep=0)
        assert problem is None


GRIDS = {  # ranks, tensor ranks, stages, ZeRO stage, exact
    "one rank": (1, 1, 1, 0, False),
    "DP2 exact": (2, 1, 1, 1, True),
    "DP4": (4, 1, 1, 2, False),
    "TP2": (2, 2, 1, 0, False),
    "TP4": (4, 4, 1, 0, False),
    "PP3": (3, 1, 3, 0, True),
    "DP2 TP2": (4, 2, 1, 2, False),
    "DP2 PP2": (4, 1, 2, 1, False),
    "TP2 PP2": (4, 2, 2, 0, False),
    "DP2 TP2 PP2": (8, 2, 2, 1, False),
}


STEPS_TO_READERS = (1, 3, 4)  # in GRIDS, from its writer on to those that read a state


@pytest.mark.parametrize("writer", GRIDS)
def test_any_grid_resumes_any_other(writer: str, tmp_path: Path) -> None:
    """Three grids load what `writer` saved and save it again: every number is the same.

    Each grid reads what three others wrote, among them are finer, coarser and no cuts.
    """
    names = list(GRIDS)
    own_number = names.index(writer)
    readers = [names[(own_number + step) % len(names)] for step in STEPS_TO_READERS]
    ranks, *grid = GRIDS[writer]
    run_on_ranks(ranks, resume_and_save, *grid, None, tmp_path / "first")
    first = checkpoint_path(tmp_path / "first", 1)
    expected = whole_state(first, PARAMETERS)
    assert all(values.abs().sum() > 0 for values in expected.values())
    for reader in readers:
        ranks, *grid = GRIDS[reader]
        run_on_ranks(ranks, resume_and_save, *grid, first, tmp_path / reader)
        found = whole_state(checkpoint_path(tmp_path / reader, 1), PARAMETERS)
        for name, values in expected.items():
            assert torch.equal(found[name], values), (writer, reader, name)


def reads_of_a_resume(tensor: int, stage: int, loaded: Path) -> list[int]:
    """How many elements each read takes from a file when this rank resumes."""
    reads = []
    read_part = TensorRef.read_part

    def recording(self: TensorRef, start: int, stop: int) -> Tensor:
        reads.append(stop - start)
        return read_part(self, start, stop)

    with comm.start("cpu", timeout_minutes=1) as mesh, pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorRef, "read_part", recording)
        _, optimizer = make_optimizer(make_grid(mesh, tensor), list(SHAPES), stage)
        saved = SavedOptimizer(loaded, optimizer.parameters)
        optimizer.load_state(saved.read, 2, None)
    return reads


def test_a_resume_reads_what_the_rank_owns_and_one_parameter_at_a_time(tmp_path: Path) -> None:
    run_on_ranks(2, resume_and_save, 1, 1, 1, False, None, tmp_path / "data")
    run_on_ranks(2, resume_and_save, 2, 1, 0, False, None, tmp_path / "tensor")
    total = sum(parameter.size for parameter in PARAMETERS.values())
    largest = max(parameter.size for parameter in PARAMETERS.values())

    of_two = run_on_ranks(2, reads_of_a_resume, 1, 1, checkpoint_path(tmp_path / "data", 1))
    assert sum(of_two[0] + of_two[1]) == 3 * total
    assert sum(of_two[0]) < 3 * total
    of_one = run_on_ranks(1, reads_of_a_resume, 1, 0, checkpoint_path(tmp_path / "tensor", 1))
    assert sum(of_one[0]) == 3 * total
    assert max(of_one[0]) <= largest


def write_by_position(
    directory: Path, vectors: list[dict[str, Tensor]], borders: list[int]
) -> None:
    """Write flat vectors as earlier versions did: files named by vector and position, no tables."""
    for number, tensors in enumerate(vectors):
        length = len(tensors["m"])
        starts = [0, *[border for border in borders if border < length], length + 1]
        stops = [*starts[1:-1], length, length + 1]  # the last rank owned padding alone
        for start, stop in zip(starts, stops, strict=True):
            path = directory / f"state-{number}-{start:012d}.safetensors"
            write_safetensors(path, {name: x[start:stop].clone() for name, x in tensors.items()})


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.sampled_from([(3, 4), (5,), (2, 9), (1,), (7, 2)]), min_size=1, max_size=7),
    num_wide=st.integers(0, 7),
    borders=st.lists(st.integers(1, 90), unique=True).map(sorted),
)
def test_files_without_tables_are_read_by_position(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[int, ...]],
    num_wide: int,
    borders: list[int],
) -> None:
    """One vector for each dtype, the larger first; in each, matrices before 1-D parameters."""
    parameters = {}
    for number, shape in enumerate(shapes):
        dtype = torch.float32 if number < num_wide else torch.bfloat16
        parameters[f"p{number}"] = WholeParameter(shape, dtype)
    groups = []
    for dtype in (torch.bfloat16, torch.float32):
        names = [name for name, parameter in parameters.items() if parameter.dtype == dtype]
        names.sort(key=lambda name: len(parameters[name].shape) == 1)
        groups.append(names)
    groups.sort(key=lambda names: -sum(parameters[name].size for name in names))

    values = {name: torch.randn(parameter.size) for name, parameter in parameters.items()}
    vectors = []
    for names in filter(None, groups):
        vector = torch.cat([values[name] for name in names])
        vectors.append({key: (k + 1) * vector for k, key in enumerate(VECTORS)})
    folder = tmp_path_factory.mktemp("state")
    write_by_position(folder, vectors, borders)
    found = whole_state(folder, parameters)
    for name in parameters:
        for k, key in enumerate(VECTORS):
            assert torch.equal(found[f"{name} {key}"], (k + 1) * values[name])


def test_a_checkpoint_of_an_earlier_version_continues_to_the_same_bytes(
    run_settings: TrainConfig, uninterrupted: str, tmp_path: Path
) -> None:
    """Its state is rewritten as three files without tables, as three ranks wrote them."""
    run = replace(run_settings, out_dir=str(tmp_path / "run"))
    run_on_ranks(1, train_here, run, 2)
    directory = checkpoint_path(tmp_path / "run", 2)
    shapes = {n: x.shape for n, x in read_safetensors(directory / "model.safetensors").items()}
    parameters = {name: WholeParameter(shape, torch.float32) for name, shape in shapes.items()}
    state = whole_state(directory, parameters)
    names = sorted(parameters, key=lambda name: len(shapes[name]) == 1)
    vector = {v: torch.cat([state[f"{name} {v}"] for name in names]) for v in VECTORS}
    for path in directory.glob("state-*.safetensors"):
        path.unlink()
    write_by_position(directory, [vector], [7001])
    hashes = {}
    for path in sorted(directory.iterdir()):
        if path.name != train_state.MANIFEST:
            hashes[path.name] = sha256_of(path)
    assert len(hashes) == len(read_json(directory / train_state.MANIFEST)["sha256"]) + 2
    write_json(directory / train_state.MANIFEST, {"sha256": hashes})
    assert run_on_ranks(2, train_here, run) == [STEPS] * 2
    assert fingerprint(run) == uninterrupted


def save_one(directory: Path, part: Part, first: int, last: int) -> None:
    """Save elements first … last of one part."""
    piece = SavedPiece(part, first, last, 0)
    vectors = {name: torch.arange(float(first), float(last)) for name in VECTORS}
    write_slice(directory / f"state-{first:05d}-0.safetensors", SavedSlice([piece], vectors))


def test_a_state_of_other_parameters_is_refused(tmp_path: Path) -> None:
    save_one(tmp_path, Part("p", (4, 5)), 0, 20)
    with pytest.raises(UserError, match="holds 20 trained parameters, this run has 21; it belongs"):
        SavedOptimizer(tmp_path, {"p": WholeParameter((21,), torch.float32)})
    with pytest.raises(UserError, match=r"holds no optimizer state of p \(5, 4\)"):
        SavedOptimizer(tmp_path, {"p": WholeParameter((5, 4), torch.float32)})
    with pytest.raises(UserError, match=r"holds no optimizer state of q \(4, 5\)"):
        SavedOptimizer(tmp_path, {"q": WholeParameter((4, 5), torch.float32)})


def test_files_without_tables_of_another_run_are_refused(tmp_path: Path) -> None:
    vector = {name: torch.zeros(30) for name in VECTORS}
    write_by_position(tmp_path, [vector], [10])
    with pytest.raises(UserError, match="ends at element 30 of a flat vector, which has 20"):
        SavedOptimizer(tmp_path, {"p": WholeParameter((4, 5), torch.float32)})
    write_by_position(tmp_path, [vector, vector], [10])
    with pytest.raises(UserError, match="this run has no flat vector 1"):
        SavedOptimizer(tmp_path, {"p": WholeParameter((5, 6), torch.float32)})


def test_elements_that_no_file_holds_are_missed(tmp_path: Path) -> None:
    save_one(tmp_path, Part("p", (4, 5)), 0, 12)
    save_one(tmp_path, Part("p", (4, 5)), 4, 12)
    with pytest.raises(UserError, match="lacks a part of the optimizer state of p; name another"):
        SavedOptimizer(tmp_path, {"p": WholeParameter((4, 5), torch.float32)})
