"""The grid of ranks: which ranks are on one line, and that each line is a mesh of its own."""

import pytest
import torch

from minillama import comm
from minillama.errors import UserError
from minillama.grid import make_grid
from tests.ranks import run_on_ranks


def test_one_rank_is_a_grid_of_its_own() -> None:
    mesh = comm.Mesh()
    grid = make_grid(mesh)
    assert grid.all is mesh
    assert grid.data is mesh
    assert (grid.stage.size, grid.tensor.size) == (1, 1)


def lines_through_this_rank(tensor_parallel: int, pipeline_parallel: int) -> dict[str, list]:
    with comm.start("cpu", timeout_minutes=1) as mesh:
        grid = make_grid(mesh, tensor_parallel, pipeline_parallel)
        lines = {"data": grid.data, "stage": grid.stage, "tensor": grid.tensor}
        ranks = {}
        for name, line in lines.items():
            ranks[name] = comm.gather_objects(line, mesh.rank)
            assert ranks[name][line.rank] == mesh.rank
        return ranks


def test_tensor_ranks_are_neighbours_and_data_ranks_are_far_apart() -> None:
    """Eight ranks, 2 × 2 × 2: rank = (data · 2 + stage) · 2 + tensor."""
    lines = run_on_ranks(8, lines_through_this_rank, 2, 2)
    assert lines[0] == {"data": [0, 4], "stage": [0, 2], "tensor": [0, 1]}
    assert lines[3] == {"data": [3, 7], "stage": [1, 3], "tensor": [2, 3]}
    assert lines[6] == {"data": [2, 6], "stage": [4, 6], "tensor": [6, 7]}


def test_a_line_of_one_rank_has_no_group() -> None:
    assert run_on_ranks(2, lines_through_this_rank, 2, 1) == [
        {"data": [rank], "stage": [rank], "tensor": [0, 1]} for rank in range(2)
    ]


def collectives_of_a_line() -> dict[str, list]:
    """All collectives, on lines of two of four ranks."""
    with comm.start("cpu", timeout_minutes=1) as mesh:
        line = make_grid(mesh, tensor_parallel=2).tensor  # ranks 0, 1 and ranks 2, 3
        own = torch.tensor([float(mesh.rank + 1)])
        owners_sum = comm.reduce_to(line, own.clone(), owner=1)()
        pairwise = comm.reduce_to(line, own.clone(), owner=1, pairwise_of=2)()
        whole = torch.zeros(2)
        whole[line.rank] = own
        return {
            "sum": comm.all_reduce_sum(line, own.clone()).tolist(),
            "max": comm.all_reduce_max(line, own.clone()).tolist(),
            "owner": (owners_sum.tolist(), pairwise.tolist()) if line.rank == 1 else [],
            "gather": comm.all_gather(line, own).tolist(),
            "in place": comm.all_gather_into(line, whole, whole[line.rank, None]).tolist(),
            "broadcast": comm.broadcast(line, own.clone(), owner=1).tolist(),
        }


def test_collectives_of_a_line_reach_its_ranks_alone() -> None:
    results = run_on_ranks(4, collectives_of_a_line)
    for rank, result in enumerate(results):
        low, high = (1.0, 2.0) if rank < 2 else (3.0, 4.0)
        is_owner = rank % 2 == 1
        assert result == {
            "sum": [low + high],
            "max": [high],
            "owner": ([low + high], [low + high]) if is_owner else [],
            "gather": [low, high],
            "in place": [low, high],
            "broadcast": [high],
        }


def ranks_that_do_not_divide() -> str:
    with comm.start("cpu", timeout_minutes=1) as mesh, pytest.raises(UserError) as error:
        make_grid(mesh, tensor_parallel=2)
    return str(error.value)


def test_ranks_that_are_no_grid_are_refused() -> None:
    for message in run_on_ranks(3, ranks_that_do_not_divide):
        assert "3 ranks" in message
        assert "start a multiple of 2 ranks" in message
