"""Ranks: the few collectives of training, on real processes; and the harness that forks them."""

import time

import pytest
import torch

from minillama import comm
from minillama.comm import Mesh
from minillama.errors import UserError
from tests.ranks import run_on_ranks


def test_one_process_needs_no_process_group() -> None:
    with comm.start("cpu") as mesh:
        assert (mesh.rank, mesh.size, mesh.is_first) == (0, 1, True)
        x = torch.tensor([1.0, 2.0])
        assert comm.all_reduce_sum(mesh, x) is comm.all_gather(mesh, x) is x
        assert comm.gather_objects(mesh, "mine") == ["mine"]
        comm.barrier(mesh)
    assert not torch.distributed.is_initialized()


def collectives() -> tuple[int, list[float], list[str], bool]:
    with comm.start("cpu", timeout_minutes=1) as mesh:
        total = comm.all_reduce_sum(mesh, torch.tensor([float(mesh.rank), 1.0]))
        words = comm.gather_objects(mesh, f"rank {mesh.rank}")
        result = mesh.rank, total.tolist(), words, mesh.is_first
    assert not torch.distributed.is_initialized()
    return result


def test_every_rank_gets_the_sum_of_all_and_the_word_of_each() -> None:
    assert run_on_ranks(3, collectives) == [
        (rank, [3.0, 3.0], ["rank 0", "rank 1", "rank 2"], rank == 0) for rank in range(3)
    ]


def make_then_find(file: str) -> bool:
    with comm.start("cpu", timeout_minutes=1) as mesh, comm.first_rank_first(mesh):
        if mesh.is_first:
            time.sleep(0.2)
            open(file, "x").close()
        return open(file).read() == ""


def test_the_first_rank_makes_a_file_before_the_others_look_for_it(tmp_path) -> None:
    assert run_on_ranks(2, make_then_find, str(tmp_path / "file")) == [True, True]


def test_only_the_first_rank_prints(capsys: pytest.CaptureFixture) -> None:
    Mesh(rank=1, size=2).print("from the second")
    Mesh(rank=0, size=2).print("from the first")
    assert capsys.readouterr().out == "from the first\n"


def fail_on_the_second() -> None:
    with comm.start("cpu", timeout_minutes=1) as mesh:
        if mesh.rank == 1:
            raise ValueError("no such thing")


def test_a_rank_that_fails_fails_the_test_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"rank 1:[\s\S]*ValueError: no such thing"):
        run_on_ranks(2, fail_on_the_second)


def test_ranks_that_hang_are_killed() -> None:
    with pytest.raises(TimeoutError, match="rank 0, 1"):
        run_on_ranks(2, time.sleep, 1000.0, timeout=0.3)


def test_ranks_that_disagree_about_a_collective_stop_with_both_places(monkeypatch):
    monkeypatch.setenv("MINILLAMA_DEBUG_COLLECTIVES", "1")

    def run():
        with comm.start("cpu", timeout_minutes=1) as mesh:
            try:
                comm.barrier(mesh) if mesh.rank else comm.all_reduce_sum(mesh, torch.ones(3))
            except UserError as error:
                return str(error)

    for message in run_on_ranks(2, run):
        assert (
            "rank 0: all_reduce of (3,) at" in message
            and "rank 1: barrier" in message
            and message.count("test_comm.py") == 2
        )


def test_a_lost_peer_is_one_line_that_names_the_rank():
    def run():
        with comm.start("cpu", timeout_minutes=0.05) as mesh:
            if mesh.rank == 1:
                return "gone"
            try:
                comm.all_reduce_sum(mesh, torch.ones(3))
            except UserError as error:
                return str(error)

    assert run_on_ranks(2, run)[0].startswith("rank 0 of 2: all_reduce failed: a peer has ended")
