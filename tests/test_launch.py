"""The launcher: several nodes, and a rank that dies and is started again."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from minillama.checkpoint import train_state
from minillama.data import demo
from minillama.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    records = demo.records(demo.DEMO, 60, seed=3, held_out=False)
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "tokenizer.model").write_bytes(
        train_tokenizer((r["instruction"] for r in records), 320)
    )
    return [
        "--init",
        "scratch",
        "--dim",
        "16",
        "--n_layers",
        "1",
        "--n_heads",
        "2",
        "--ffn_dim",
        "32",
        "--context",
        "128",
        "--max_steps",
        "4",
        "--tokenizer",
        str(tmp_path / "tokenizer.model"),
        "--data",
        str(tmp_path / "data.json"),
        "--cache_dir",
        str(tmp_path / "cache"),
        "--template",
        "llama_factory_default",
        "--per_device_train_batch_size",
        "1",
        "--save_steps",
        "2",
        "--zero_stage",
        "2",
        "--device",
        "cpu",
        "--reduction",
        "exact",
        "--threads",
        "1",
        "--out_dir",
        str(tmp_path / "run"),
    ]


def torchrun(script: list[str], *flags: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *flags, *script]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_nodes_are_two_agents_that_know_one_address(arguments, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    nodes = [
        torchrun(
            ["train.py", *arguments],
            "--nnodes",
            "2",
            "--node_rank",
            str(rank),
            "--nproc_per_node",
            "1",
            "--master_addr",
            "127.0.0.1",
            "--master_port",
            port,
        )
        for rank in range(2)
    ]
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert (
        "4 steps on 2 × cpu" in outputs[0]
        and json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4
    )


def test_a_rank_that_dies_is_restarted_and_goes_on_from_the_checkpoint(arguments, tmp_path):
    script = tmp_path / "dies_once.py"
    script.write_text(
        "import os, pathlib, runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from minillama.training import trainer\n"
        f"mark, update = pathlib.Path({str(tmp_path / 'died')!r}), trainer.Trainer.update\n"
        "def deadly(self, *a):\n"
        "    if self.step == 3 and self.mesh.rank == 1 and not mark.exists():\n"
        "        mark.touch()\n"
        "        os._exit(9)\n"
        "    return update(self, *a)\n"
        "trainer.Trainer.update = deadly\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    run = torchrun(
        [str(script), *arguments], "--standalone", "--nproc_per_node", "2", "--max_restarts", "1"
    )
    output = run.communicate(timeout=300)[0]
    assert run.returncode == 0 and (tmp_path / "died").exists(), output
    assert (
        "step-000002 at step 2" in output
        and (tmp_path / "run" / "final" / "model.safetensors").is_file()
    )


# train.py with steps slow enough to be interrupted
SLOW = """
import os, runpy, sys, time
from pathlib import Path
from minillama.training import trainer
update = trainer.Trainer.update
trainer.Trainer.update = lambda self, *a: (time.sleep(0.2), update(self, *a))[1]
Path(sys.argv.pop(1), os.environ["RANK"]).write_text(str(os.getpid()))
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_ranks_save_and_end_when_torchrun_is_killed_or_stopped(
    number: signal.Signals, arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "pids").mkdir()
    command = [str(tmp_path / "slow.py"), str(tmp_path / "pids"), *arguments]
    run = torchrun(
        [*command, "--max_steps", "500", "--save_steps", "1000"],
        "--standalone",
        "--nproc_per_node",
        "2",
    )
    metrics = tmp_path / "run/metrics.jsonl"
    wait_until(lambda: metrics.is_file() and metrics.stat().st_size > 0)
    run.send_signal(number)
    run.communicate(timeout=300)
    assert run.returncode != 0
    pids = [int(path.read_text()) for path in (tmp_path / "pids").iterdir()]
    wait_until(lambda: not any(map(is_training, pids)))
    newest = train_state.newest_intact(tmp_path / "run", print)
    assert newest is not None


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_training(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(") ")[2][0] != "Z"
