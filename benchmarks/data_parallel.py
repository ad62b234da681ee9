"""Data-parallel training on two ranks: speed and memory beside torch and DeepSpeed.

Of torch: DDP, ZeroRedundancyOptimizer and FSDP2.

    python benchmarks/data_parallel.py --shape 110m --tokens 256 --rounds 5

DeepSpeed's ZeRO-1 and ZeRO-2 join where it is installed, best in an environment of its own, whose
python then runs all sides (it builds one extension when first used, so a C++ compiler must be
there):

    pip install torch==2.13.0 numpy setuptools wheel ninja py-cpuinfo
    DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip install --no-build-isolation deepspeed

Every side trains the same model of ours from the same weights in fp32 on the same tokens, with
AdamW and clipping, in fresh processes over gloo, one thread a rank; sides take turns. Printed:
tokens per second of all ranks, the same over DDP's of that round, CPU seconds per step of a rank,
peak resident memory of a rank (medians, smallest and largest), and the last loss, which must agree.
"""

import argparse
import importlib.util
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BUCKET = 10**7  # elements; ours and DeepSpeed's
SIDES = [
    "ours, stage 0",
    "ours, stage 1",
    "ours, stage 2",
    "DDP + AdamW",
    "ZeroRedundancyOptimizer",
    "FSDP2",
]
REFERENCE = "DDP + AdamW"  # whose tokens/s of the same round the others' are divided by
if importlib.util.find_spec("deepspeed"):
    SIDES += ["DeepSpeed, stage 1", "DeepSpeed, stage 2"]


def run_rank(side: str, shape: str, tokens: int, steps: int) -> None:
    """One rank of one side; rank 0 prints what it measured, as JSON."""
    import torch
    import torch.distributed as dist

    from minillama.hf_config import published
    from minillama.model import Llama

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    model = Llama(published(shape)).initialise(torch.Generator().manual_seed(0))
    sides = {
        "ours": ours,
        "DDP": ddp,
        "ZeroRedundancyOptimizer": zero_redundancy,
        "FSDP2": fsdp,
        "DeepSpeed": deep_speed,
    }
    train_step = sides[side.split(",")[0].split()[0]]
    step = train_step(model, side)
    loss = seconds = cpu = 0.0
    for number in range(steps + 1):
        batch = torch.randint(
            0, 32000, (1, tokens), generator=torch.Generator().manual_seed(number * size + rank)
        )
        dist.barrier()
        began, cpu_began = time.perf_counter(), time.process_time()
        loss = step(batch)
        if number:  # the first is a warm-up
            seconds, cpu = (
                seconds + time.perf_counter() - began,
                cpu + time.process_time() - cpu_began,
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    losses: list[float] = [0.0] * size
    dist.all_gather_object(losses, loss)
    if rank == 0:
        speed = tokens * size * steps / seconds
        print(
            json.dumps(
                {
                    "tokens_per_second": speed,
                    "cpu": cpu / steps,
                    "peak": peak,
                    "loss": sum(losses) / size,
                }
            )
        )
    dist.destroy_process_group()


def ours(model, side: str):
    import torch
    import torch.distributed as dist

    from minillama.comm import Mesh
    from minillama.grid import make_grid
    from minillama.parallel.sharded_optimizer import ShardedOptimizer
    from minillama.train_config import TrainConfig

    mesh = Mesh(dist.get_rank(), dist.get_world_size())
    optimizer = ShardedOptimizer(
        model.named_parameters(),
        make_grid(mesh),
        TrainConfig(zero_stage=int(side[-1]), bucket_elements=BUCKET),
    )

    def step(batch: torch.Tensor) -> float:
        optimizer.zero_grad()
        loss = model.loss_sum(batch[:, :-1], batch[:, 1:]) / (batch.shape[1] - 1)
        optimizer.backward(loss / mesh.size, mesh.size)
        optimizer.step(1e-4, 1.0)
        return loss.item()

    return step


def with_optimizer(wrapped, optimizer, clip):
    def step(batch) -> float:
        loss = wrapped(batch)
        loss.backward()
        clip()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def module_with_loss(model):
    """A module whose forward is the loss, as the wrappers of torch want it."""
    import torch

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, batch):
            return self.net.loss_sum(batch[:, :-1], batch[:, 1:]) / (batch.shape[1] - 1)

    return Loss()


def ddp(model, side: str):
    import torch

    wrapped = torch.nn.parallel.DistributedDataParallel(
        module_with_loss(model), gradient_as_bucket_view=True
    )
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    return with_optimizer(
        wrapped, optimizer, lambda: torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
    )


def zero_redundancy(model, side: str):
    import torch
    from torch.distributed.optim import ZeroRedundancyOptimizer

    wrapped = torch.nn.parallel.DistributedDataParallel(
        module_with_loss(model), gradient_as_bucket_view=True
    )
    optimizer = ZeroRedundancyOptimizer(
        wrapped.parameters(), torch.optim.AdamW, lr=1e-4, weight_decay=0.0, fused=True
    )
    return with_optimizer(
        wrapped, optimizer, lambda: torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
    )


def fsdp(model, side: str):
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    wrapped = fully_shard(module_with_loss(model), mesh=mesh, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    return with_optimizer(
        wrapped, optimizer, lambda: torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
    )


def deep_speed(model, side: str):
    import deepspeed
    import torch

    module = module_with_loss(model)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": int(side[-1]),
                "reduce_bucket_size": BUCKET,
                "allgather_bucket_size": BUCKET,
            },
        },
    )

    def step(batch) -> float:
        loss = engine(batch)
        engine.backward(loss)
        engine.step()
        return loss.item()

    return step


def measure(side: str, options: argparse.Namespace) -> dict:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    ranks = []
    for rank in range(options.ranks):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(options.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "DS_ACCELERATOR": "cpu",
        }
        command = [
            sys.executable,
            __file__,
            "--side",
            side,
            "--shape",
            options.shape,
            "--tokens",
            str(options.tokens),
            "--steps",
            str(options.steps),
        ]
        ranks.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    outputs = [rank.communicate() for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{side}: {outputs[0][1][-2000:]}")
    return json.loads(
        next(line for line in outputs[0][0].splitlines() if line.startswith('{"tokens'))
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="110m")
    parser.add_argument("--tokens", type=int, default=256, help="of a rank and step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_rank(options.side, options.shape, options.tokens, options.steps)
        return
    found: dict[str, list[dict]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            found[side].append(measure(side, options))
    print(
        f"{options.shape}, fp32, {options.ranks} ranks x {options.tokens} tokens, "
        f"medians of {options.rounds} rounds of {options.steps} steps"
    )
    print(
        f"{'':26}{'tokens/s':>20}{f'x {REFERENCE}':>20}{'CPU s a step':>20}{'peak GB a rank':>20}"
        f"{'last loss':>12}"
    )
    for side, runs in found.items():
        ratios = []
        for run, reference in zip(runs, found[REFERENCE], strict=True):
            ratios.append(run["tokens_per_second"] / reference["tokens_per_second"])
        print(
            f"{side:26}{spread([r['tokens_per_second'] for r in runs], 0):>20}"
            f"{spread(ratios, 2):>20}"
            f"{spread([r['cpu'] for r in runs], 2):>20}"
            f"{spread([r['peak'] / 1e9 for r in runs], 2):>20}{runs[-1]['loss']:>12.5f}"
        )


def spread(values: list[float], digits: int) -> str:
    median = statistics.median(values)
    return f"{median:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


if __name__ == "__main__":
    main()
