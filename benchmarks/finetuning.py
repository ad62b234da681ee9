"""Supervised fine-tuning on a real length distribution, beside three ways of padding.

    python benchmarks/finetuning.py --data alpaca_en_demo.json --tokenizer tokenizer.model

Every side trains a LLaMA of the 15M shape in full (forward, backward, clipping, AdamW) on batches
of four rows of up to 512 tokens drawn from the same records, rendered and labelled once by our
template `alpaca`. They differ in how a batch is laid out:

    fixed     transformers, every row padded to 512                            (FastChat's way)
    dynamic   transformers, rows padded to the longest of the batch
    grouped   transformers, the same over its own LengthGroupedSampler         (group_by_length)
    packed    minillama, documents end to end, four rows of up to 512 tokens

Useful tokens are those of the documents. Sides take turns; each figure is the median over the
rounds, with the smallest and largest.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minillama.comm import Mesh
from minillama.data.batches import BatchPlan
from minillama.data.token_cache import open_data
from minillama.data.tokenize import DataOptions
from minillama.data.windows import TrainingWindows
from minillama.grid import make_grid
from minillama.hf_config import published, to_hf
from minillama.model import Llama
from minillama.ops import IGNORE, Documents
from minillama.parallel.sharded_optimizer import ShardedOptimizer
from minillama.tokenizer import open_tokenizer
from minillama.train_config import TrainConfig

ROWS, LENGTH = 4, 512


class Padded:
    """transformers on padded rows, in an order of its own."""

    def __init__(self, windows: TrainingWindows, kind: str) -> None:
        import transformers

        self.windows, self.kind = windows, kind
        self.model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**to_hf(published("15m")))
        )
        ours = Llama(published("15m")).initialise(torch.Generator().manual_seed(0))
        self.model.load_state_dict(ours.state_dict())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        lengths = windows.length.tolist()
        if kind == "grouped":
            sampler = transformers.trainer_pt_utils.LengthGroupedSampler(
                ROWS, lengths=lengths, generator=torch.Generator().manual_seed(0)
            )
            order = list(sampler)
        else:
            order = np.random.default_rng(0).permutation(len(lengths)).tolist()
        batches = [order[i : i + ROWS] for i in range(0, len(order) - ROWS + 1, ROWS)]
        self.batches = [batches[i] for i in np.random.default_rng(1).permutation(len(batches))]

    def step(self, number: int) -> int:
        documents = [
            self.windows.batch(np.array([i])) for i in self.batches[number % len(self.batches)]
        ]
        width = LENGTH if self.kind == "fixed" else max(len(d.tokens) for d in documents)
        tokens, mask = (
            torch.zeros(ROWS, width, dtype=torch.int64),
            torch.zeros(ROWS, width, dtype=torch.int64),
        )
        labels = torch.full((ROWS, width), IGNORE)
        for row, d in enumerate(documents):
            n = len(d.tokens)
            tokens[row, :n], mask[row, :n] = torch.from_numpy(d.tokens), 1
            labels[row, 1:n] = torch.from_numpy(d.labels[:-1])  # transformers shifts by itself
        loss = self.model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sum(len(d.tokens) for d in documents)


class Packed:
    """minillama on documents end to end."""

    def __init__(self, windows: TrainingWindows) -> None:
        self.model = Llama(published("15m")).initialise(torch.Generator().manual_seed(0))
        self.optimizer = ShardedOptimizer(
            self.model.named_parameters(), make_grid(Mesh()), TrainConfig()
        )
        self.plan = BatchPlan(
            windows, rows_per_step=ROWS, rows_per_micro_batch=ROWS, seed=0, epochs=1.0
        )

    def step(self, number: int) -> int:
        batch = self.plan.micro_batches(number % (self.plan.total_steps - 1))[0]
        self.optimizer.zero_grad()
        tokens, labels = torch.from_numpy(batch.tokens)[None], torch.from_numpy(batch.labels)[None]
        self.optimizer.backward(
            self.model.loss_sum(tokens, labels, Documents(batch.lengths)) / batch.targets, 1
        )
        self.optimizer.step(1e-5, 1.0)
        return len(batch.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="batches a side takes in a round")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="1: CPU time means work, not waiting for the other thread",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = open_tokenizer(options.tokenizer)
    windows = TrainingWindows(
        open_data((str(options.data),), tokenizer, DataOptions(template="alpaca", quiet=True)),
        LENGTH,
    )
    print(
        f"{len(windows.length)} records, {windows.length.sum():,} tokens, mean "
        f"{windows.length.mean():.0f}; "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    sides = {kind: Padded(windows, kind) for kind in ("fixed", "dynamic", "grouped")} | {
        "packed": Packed(windows)
    }
    for side in sides.values():
        side.step(0)  # warm-up
    cpu, wall = {name: [] for name in sides}, {name: [] for name in sides}
    for number in range(options.rounds):
        for name, side in sides.items():
            cpu_began, began, useful = time.process_time(), time.perf_counter(), 0
            for step in range(options.steps):
                useful += side.step(1 + number * options.steps + step)
            cpu[name].append(useful / (time.process_time() - cpu_began))
            wall[name].append(useful / (time.perf_counter() - began))
    print(
        f"{'':10}{'useful tokens / CPU s':>28}{'packed is, by CPU time':>34}"
        f"{'useful tokens / s':>24}"
    )
    for name in sides:
        ratios = [ours / theirs for ours, theirs in zip(cpu["packed"], cpu[name], strict=True)]
        print(
            f"{name:10}{spread(cpu[name]):>28}{spread(ratios, 2) + ' times faster':>34}"
            f"{spread(wall[name]):>24}"
        )


def spread(values: list[float], digits: int = 0) -> str:
    median = statistics.median(values)
    return f"{median:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


if __name__ == "__main__":
    main()
