"""A wrong environment of ranks is one line at once: no traceback, and no wait without end."""

import socket
from collections.abc import Iterator
from datetime import timedelta

import pytest

from minillama import comm, launch
from minillama.errors import UserError

TWO_RANKS = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29411"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in TWO_RANKS.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def busy_port() -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        yield str(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("RANK", None, "RANK is missing; torchrun"),
        ("RANK", "5", "RANK=5: must be below WORLD_SIZE=2"),
        ("RANK", "-1", "RANK=-1: must be a whole number from 0"),
        ("WORLD_SIZE", "many", "WORLD_SIZE=many: must be a whole number from 1"),
        ("WORLD_SIZE", "0", "WORLD_SIZE=0"),
        ("LOCAL_RANK", "1.5", "LOCAL_RANK=1.5"),
        ("MASTER_ADDR", None, "MASTER_ADDR is missing"),
        ("MASTER_PORT", None, "MASTER_PORT is missing"),
        ("MASTER_PORT", "abc", "MASTER_PORT=abc: must be a whole number from 1"),
        ("MASTER_PORT", "70000", "MASTER_PORT=70000: must be a whole number from 1 to 65535"),
    ],
)
def test_a_wrong_variable_is_named(
    name: str, value: str | None, named: str, environment: pytest.MonkeyPatch
) -> None:
    if value is None:
        environment.delenv(name)
    else:
        environment.setenv(name, value)
    with pytest.raises(UserError, match=named), comm.start("cpu"):
        pass


def test_a_rank_without_others_is_named(environment: pytest.MonkeyPatch) -> None:
    environment.delenv("WORLD_SIZE")
    environment.setenv("RANK", "1")
    with pytest.raises(UserError, match="RANK=1: must be below WORLD_SIZE=1"):
        launch.read_launch()


def test_the_number_of_ranks_on_a_machine_is_checked_too(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LOCAL_WORLD_SIZE", "0")
    with pytest.raises(UserError, match="LOCAL_WORLD_SIZE=0"):
        launch.ranks_on_machine()


def test_a_busy_port_is_named(environment: pytest.MonkeyPatch, busy_port: str) -> None:
    environment.setenv("MASTER_PORT", busy_port)
    with (
        pytest.raises(UserError, match=f"do not meet at .*:{busy_port}.*the port free"),
        comm.start("cpu"),
    ):
        pass


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_peer_that_does_not_come_is_not_waited_for_without_end(
    rank: str, environment: pytest.MonkeyPatch
) -> None:
    """Rank 0 waits for the other one, and rank 1 for a store that nobody opens."""
    environment.setattr(comm, "RENDEZVOUS_TIMEOUT", timedelta(seconds=1))
    environment.setenv("RANK", rank)
    do_not_meet = pytest.raises(UserError, match=f"rank {rank} of 2: the ranks do not meet")
    with do_not_meet, comm.start("cpu"):
        pass
