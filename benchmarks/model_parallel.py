"""One model over two ranks: tensor and pipeline parallelism beside ZeRO and torch's own.

    python benchmarks/model_parallel.py                    110M shape, some minutes
    python benchmarks/model_parallel.py --shape tiny --rounds 1 --loading ""     a smoke test

Every side trains the same weights in fp32 on the same micro-batches with AdamW and clipping, over
gloo, one thread a rank, in fresh processes; sides take turns. torch's own are
torch.distributed.tensor.parallel with its loss_parallel, and torch.distributed.pipelining with
Schedule1F1B, on our model.

    tokens/s         of all ranks together, after a step that is not counted
    peak GB          anonymous memory of the larger rank, above that of a process that has imported
                     torch and joined its group; and its share of one rank's
    elements sent    by a rank in a step, in millions, and what theory says:
                     TP (4 L + 2) M T C, PP M T C, ZeRO-1 W, ZeRO-2 (A + 1) W / 2 for 2 ranks
                     L layers, M micro-batches of T tokens, A of them a rank, C width, W weights
    last loss        a side whose last loss differs by more than 1e-4 from one rank's is void

--loading SHAPE measures, last, the peak of one of four tensor ranks that loads a bf16 checkpoint
of that shape, as a share of the checkpoint's bytes.
"""

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ALONE = "one rank"
JOINED = "torch, joined"  # a process that has imported torch and joined its group
OURS = {  # tensor_parallel, pipeline_parallel, zero_stage
    ALONE: (1, 1, 0),
    "TP2": (2, 1, 0),
    "PP2": (1, 2, 0),
    "ZeRO-1": (1, 1, 1),
    "ZeRO-2": (1, 1, 2),
}
TORCHS = ("torch TP2", "torch PP2")
LEARNING_RATE = 1e-4
MAX_LOSS_DIFFERENCE = 1e-4
LOADING_RANKS = 4

# One step on a global batch (M, T + 1); returns the loss where it is known.
Step = Callable[[Any], float | None]


@dataclass(frozen=True)
class Work:
    """What all sides train on."""

    directory: str  # of the checkpoint
    micro_batches: int
    tokens: int
    steps: int


@dataclass(frozen=True)
class Measured:
    """One run of a side."""

    tokens_per_second: float
    peak: int  # bytes of the larger rank
    sent: float  # elements in a step, of the rank that sent most
    loss: float


def shape_of(name: str) -> Any:
    from minillama.hf_config import published
    from minillama.llama_config import LlamaConfig

    if name != "tiny":
        return published(name)
    return LlamaConfig(
        dim=64,
        n_layers=4,
        n_heads=4,
        n_kv_heads=4,
        head_dim=16,
        ffn_dim=176,
        vocab_size=509,
        max_seq_len=256,
        norm_eps=1e-5,
        rope_theta=10000.0,
    )


def make_checkpoint(shape: str, dtype: str, directory: str) -> None:
    """Write random weights, one tensor at a time."""
    import torch

    from minillama.checkpoint.hf_writer import write_configs, write_weights

    config = shape_of(shape)
    torch_dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    shapes = config.parameter_shapes()

    def tensors():
        for name, size in shapes.items():
            if name.endswith("norm.weight"):
                yield name, torch.ones(size, dtype=torch_dtype)
            else:
                yield (
                    name,
                    torch.empty(size).normal_(0.0, 0.02, generator=generator).to(torch_dtype),
                )

    Path(directory).mkdir()
    specs = {name: (torch_dtype, size) for name, size in shapes.items()}
    write_weights(Path(directory), tensors(), specs)
    write_configs(Path(directory), config, torch_dtype)


def global_batch(work: Work, number: int, vocab_size: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(number)
    size = (work.micro_batches, work.tokens + 1)
    return torch.randint(0, vocab_size, size, generator=generator)


def run_rank(side: str, work: Work) -> None:
    """One rank of one side; prints what it measured, as JSON."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if side == JOINED:
        dist.init_process_group("gloo")
        print(json.dumps({"seconds": 1.0, "sent": 0.0, "loss": None}))
        time.sleep(0.5)
        return
    from minillama import comm
    from minillama.hf_config import read_config

    vocab_size = read_config(Path(work.directory)).vocab_size
    with comm.start("cpu") as mesh:
        make_step = torchs_step if side in TORCHS else our_step
        step, elements_sent = make_step(side, mesh, work)
        seconds = 0.0
        sent = 0.0
        loss = None
        for number in range(work.steps + 1):
            batch = global_batch(work, number, vocab_size)
            comm.barrier(mesh)
            sent_before = elements_sent()
            began = time.perf_counter()
            loss = step(batch)
            comm.barrier(mesh)
            if number > 0:  # the first is a warm-up
                seconds += time.perf_counter() - began
                sent += elements_sent() - sent_before
    print(json.dumps({"seconds": seconds, "sent": sent / work.steps, "loss": loss}))


def our_step(side: str, mesh: Any, work: Work) -> tuple[Step, Callable[[], float]]:
    """A step of ours, and how many elements this rank has sent so far."""
    import torch

    from minillama import comm
    from minillama.checkpoint.hf_reader import load_model
    from minillama.checkpoint.placing import loading_plan
    from minillama.grid import make_grid
    from minillama.hf_config import read_config
    from minillama.parallel.pipeline import keep_stage
    from minillama.parallel.sharded_optimizer import ShardedOptimizer
    from minillama.parallel.tensor import connect_ranks
    from minillama.train_config import TrainConfig

    tensor_parallel, pipeline_parallel, zero_stage = OURS[side]
    grid = make_grid(mesh, tensor_parallel, pipeline_parallel)
    data = grid.data
    config = read_config(Path(work.directory))
    plan = loading_plan(config, [mesh.device], grid.stage)
    model = load_model(Path(work.directory), device_of=plan, mesh=grid.tensor)
    stage = keep_stage(model, grid.stage) if grid.stage.size > 1 else None
    connect_ranks(model, grid.tensor)
    per_rank = work.micro_batches // data.size
    settings = TrainConfig(zero_stage=zero_stage, gradient_accumulation_steps=per_rank)
    optimizer = ShardedOptimizer(model.named_parameters(), grid, settings)

    def step(batch: torch.Tensor) -> float:
        total = torch.zeros(())
        own = batch[data.rank :: data.size]

        def forward(number: int) -> torch.Tensor:
            row = own[number, None]
            output = model.loss_sum(row[:, :-1], row[:, 1:])
            if stage is not None and not stage.is_last:
                return output
            loss = output / (len(batch) * work.tokens)
            total.add_(loss.detach())
            return loss

        def backward(number: int, loss: torch.Tensor) -> None:
            optimizer.backward(loss, data.size)

        optimizer.zero_grad()
        if stage is None:
            for number in range(len(own)):
                backward(number, forward(number))
        else:
            stage.run_1f1b([work.tokens] * len(own), forward, backward)
        optimizer.step(LEARNING_RATE, 1.0)
        comm.all_reduce_sum(data, total)
        return comm.all_reduce_sum(grid.stage, total).item()

    return step, lambda: grid.elements_sent


def torchs_step(side: str, mesh: Any, work: Work) -> tuple[Step, Callable[[], float]]:
    """A step of torch's own. What it sends is not counted."""
    from minillama import ops
    from minillama.checkpoint.hf_reader import load_model

    ops.choose("linear=reference")  # F.linear, which DTensor knows
    model = load_model(Path(work.directory))
    if side == "torch TP2":
        return tensor_parallel_step(model, mesh, work), lambda: 0.0
    return pipelining_step(model, mesh, work), lambda: 0.0


def tensor_parallel_step(model: Any, mesh: Any, work: Work) -> Step:
    """torch.distributed.tensor.parallel: linears by rows and columns, vocabulary and loss cut."""
    import torch
    import torch.nn.functional as F
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        loss_parallel,
        parallelize_module,
    )

    plan: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    for name, _ in model.named_modules():
        kind = name.rpartition(".")[2]
        if kind in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            plan[name] = ColwiseParallel()
        elif kind in ("o_proj", "down_proj"):
            plan[name] = RowwiseParallel()
    parallelize_module(model, init_device_mesh("cpu", (mesh.size,)), plan)
    # Lists of DTensors and of plain tensors do not mix.
    cut = [p for p in model.parameters() if isinstance(p, DTensor)]
    whole = [p for p in model.parameters() if not isinstance(p, DTensor)]
    optimizers = [
        torch.optim.AdamW(group, lr=LEARNING_RATE, weight_decay=0.0) for group in (cut, whole)
    ]

    def step(batch: torch.Tensor) -> float:
        total = 0.0
        for row in batch:
            hidden = model(row[None, :-1])
            logits = model.lm_head(hidden)
            with loss_parallel():
                loss = F.cross_entropy(logits.squeeze(0), row[1:]) / len(batch)
                loss.backward()
            total += loss.item()
        norm_of_cut = torch.nn.utils.get_total_norm([p.grad for p in cut]).full_tensor()
        norm_of_whole = torch.nn.utils.get_total_norm([p.grad for p in whole])
        norm = (norm_of_cut.square() + norm_of_whole.square()).sqrt()
        for group, optimizer in zip((cut, whole), optimizers, strict=True):
            torch.nn.utils.clip_grads_with_norm_(group, 1.0, norm)
            optimizer.step()
            optimizer.zero_grad()
        return total

    return step


def pipelining_step(model: Any, mesh: Any, work: Work) -> Step:
    """torch.distributed.pipelining: two stages, Schedule1F1B."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    middle = model.config.n_layers // 2

    class Part(torch.nn.Module):
        """Half of the layers, and what is in front of them or behind."""

        def __init__(self) -> None:
            super().__init__()
            layers = model.model.layers
            self.layers = layers[:middle] if mesh.is_first else layers[middle:]
            self.embed = model.model.embed_tokens if mesh.is_first else None
            self.norm = None if mesh.is_first else model.model.norm
            self.head = None if mesh.is_first else model.lm_head

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.embed is not None:
                x = self.embed(x)
            for layer in self.layers:
                x = layer(x, cos, sin, None, None)
            return x if self.norm is None else self.head(self.norm(x))

    def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.squeeze(0), labels.squeeze(0))

    cos, sin = model.rotary.get(model.config, work.tokens, torch.device("cpu"))
    cos = cos[: work.tokens]
    sin = sin[: work.tokens]
    part = Part()
    stage = PipelineStage(part, mesh.rank, mesh.size, torch.device("cpu"))
    schedule = Schedule1F1B(stage, work.micro_batches, loss_of)
    optimizer = torch.optim.AdamW(part.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    def step(batch: torch.Tensor) -> float | None:
        losses: list[torch.Tensor] = []
        if mesh.is_first:
            schedule.step(batch[:, :-1].contiguous())
        else:
            schedule.step(target=batch[:, 1:].contiguous(), losses=losses, return_outputs=False)
        norm = torch.nn.utils.get_total_norm([p.grad for p in part.parameters()])
        squared = norm.square()
        dist.all_reduce(squared)
        torch.nn.utils.clip_grads_with_norm_(part.parameters(), 1.0, squared.sqrt())
        optimizer.step()
        optimizer.zero_grad()
        return float(sum(losses)) / len(losses) if losses else None

    return step


def load_rank(directory: str, rank: int) -> None:
    """Load what one of LOADING_RANKS tensor ranks holds."""
    import torch

    from minillama.checkpoint.hf_reader import load_model
    from minillama.comm import Mesh

    load_model(Path(directory), torch.bfloat16, mesh=Mesh(rank, LOADING_RANKS))


def anonymous_bytes(process_id: int) -> int:
    """The anonymous resident memory of a process; 0 when it has ended."""
    try:
        status = Path(f"/proc/{process_id}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    match = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(match[1]) if match else 0


def start(arguments: list[str], rank: int, size: int, port: int) -> subprocess.Popen:
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, __file__, *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_processes(arguments: list[str], size: int) -> tuple[list[str], int]:
    """Run ranks to their end. Returns what each printed, and the peak memory of the largest."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks = [start(arguments, rank, size, port) for rank in range(size)]
    peak = 0
    while any(rank.poll() is None for rank in ranks):
        peak = max(peak, *(anonymous_bytes(rank.pid) for rank in ranks))
        time.sleep(0.005)
    outputs = [rank.communicate() for rank in ranks]
    for rank, (_, errors) in zip(ranks, outputs, strict=True):
        if rank.returncode:
            sys.exit(f"{' '.join(arguments)} failed: {errors[-2000:]}")
    return [output for output, _ in outputs], peak


def measure(side: str, work: Work) -> Measured:
    size = 1 if side == ALONE else 2
    arguments = ["--rank_of", side, "--work", json.dumps(vars(work))]
    outputs, peak = run_processes(arguments, size)
    ranks = [json.loads(output.splitlines()[-1]) for output in outputs]
    losses = [rank["loss"] for rank in ranks if rank["loss"] is not None]
    tokens = work.micro_batches * work.tokens * work.steps
    return Measured(
        tokens_per_second=tokens / max(rank["seconds"] for rank in ranks),
        peak=peak,
        sent=max(rank["sent"] for rank in ranks),
        loss=losses[-1] if losses else 0.0,
    )


def elements_in_theory(side: str, config: Any, work: Work) -> float:
    """What a rank sends in a step. None of the small votes and norms are counted."""
    activations = work.micro_batches * work.tokens * config.dim
    if side == "TP2":  # each sum over two ranks sends what it adds up
        return (4 * config.n_layers + 2) * activations
    if side == "PP2":
        return activations
    if side == "ZeRO-1":
        return config.parameter_count()
    if side == "ZeRO-2":
        return (work.micro_batches // 2 + 1) * config.parameter_count() / 2
    return 0.0


def spread(values: list[float], digits: int) -> str:
    median = statistics.median(values)
    return f"{median:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def print_table(found: dict[str, list[Measured]], config: Any, work: Work) -> None:
    base = statistics.median(run.peak for run in found.pop(JOINED))
    alone = statistics.median(run.peak for run in found[ALONE]) - base
    expected = found[ALONE][-1].loss
    print(
        f"{'':12}{'tokens/s':>20}{'peak GB':>10}{'share':>7}{'sent M':>9}{'theory':>9}"
        f"{'last loss':>11}"
    )
    for side, runs in found.items():
        peak = statistics.median(run.peak for run in runs) - base
        theory = elements_in_theory(side, config, work)
        has_count = side in OURS
        sent = f"{runs[-1].sent / 1e6:.2f}" if has_count else "-"
        in_theory = f"{theory / 1e6:.2f}" if has_count else "-"
        is_void = any(abs(run.loss - expected) > MAX_LOSS_DIFFERENCE for run in runs)
        print(
            f"{side:12}{spread([run.tokens_per_second for run in runs], 0):>20}"
            f"{peak / 1e9:>10.3f}{peak / alone:>7.2f}{sent:>9}{in_theory:>9}"
            f"{runs[-1].loss:>11.5f}{'  void: another loss' if is_void else ''}"
        )


def print_loading(shape: str, base: float, folder: Path) -> None:
    directory = folder / "loaded"
    make = ["--make", str(directory), "--shape", shape, "--dtype", "bfloat16"]
    run_processes(make, 1)
    total = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    for rank in (0, LOADING_RANKS - 1):
        _, peak = run_processes(["--load", str(directory), "--load_rank", str(rank)], 1)
        above = peak - base
        print(
            f"loading rank {rank} of TP{LOADING_RANKS}, {shape} in bf16: peak "
            f"{above / 1e9:.3f} GB, {above / total:.2f} of the model's {total / 1e9:.3f} GB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="110m", help="a published size, or tiny")
    parser.add_argument("--tokens", type=int, default=256, help="of a micro-batch")
    parser.add_argument("--micro_batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loading", default="1.1b", help="shape; empty: do not measure loading")
    parser.add_argument("--rank_of", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    parser.add_argument("--load_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_checkpoint(options.shape, options.dtype, options.make)
    elif options.load:
        load_rank(options.load, options.load_rank)
    elif options.rank_of:
        run_rank(options.rank_of, Work(**json.loads(options.work)))
    else:
        run_all(options)


def run_all(options: argparse.Namespace) -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory = folder / "model"
        run_processes(["--make", str(directory), "--shape", options.shape], 1)
        work = Work(str(directory), options.micro_batches, options.tokens, options.steps)
        found: dict[str, list[Measured]] = {side: [] for side in (JOINED, *OURS, *TORCHS)}
        for _ in range(options.rounds):
            for side, runs in found.items():
                runs.append(measure(side, work))
        base = statistics.median(run.peak for run in found[JOINED])
        print(
            f"{options.shape}, fp32, 2 ranks, {work.micro_batches} micro-batches of {work.tokens} "
            f"tokens, medians of {options.rounds} rounds of {work.steps} steps"
        )
        print_table(found, shape_of(options.shape), work)
        if options.loading:
            print_loading(options.loading, base, folder)


if __name__ == "__main__":
    main()
