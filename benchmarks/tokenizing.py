"""Tokenizing 50,000 alpaca records: ours, transformers' fast tokenizer, and FastChat's way.

Every side reads the same JSON, renders Stanford's prompt, and ends with ids and a trained-on mask
of every record. Ours also writes them to disk. The 999 given records are repeated with words
altered at random, so that a cache of words meets new ones.

    python benchmarks/tokenizing.py --input alpaca.json --tokenizer tokenizer.model --pairs 5

Each run is a process of its own; pairs are interleaved; CPU seconds are those of the process and
its workers, peak memory that of the largest one. `transformers` tokenizes each text once and takes
the boundary from its offsets, its cheapest way.
"""

import argparse
import json
import os
import random
import resource
import statistics
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
BATCH = 1000


def make_records(source: Path, count: int) -> list[dict[str, str]]:
    """`count` records.

    The given ones, over and over, with one word in fifty spelt in a way not seen before.
    """
    rng, given = random.Random(0), json.loads(source.read_text(encoding="utf-8"))

    def vary(text: str) -> str:
        words = text.split(" ")
        for _ in range(len(words) // 50 + 1):
            words[rng.randrange(len(words))] = "".join(
                rng.choices(string.ascii_lowercase, k=rng.randint(3, 9))
            )
        return " ".join(words)

    return [
        {"instruction": vary(r["instruction"]), "input": r["input"], "output": vary(r["output"])}
        for r in (given[i % len(given)] for i in range(count))
    ]


def ours(data: Path, tokenizer: Path, workers: int) -> int:
    from minillama.data.tokenize import DataOptions, build_dataset
    from minillama.tokenizer import open_tokenizer

    meta = build_dataset(
        [data],
        open_tokenizer(tokenizer),
        data.with_name(f"ours{workers}"),
        DataOptions(workers=workers, quiet=True),
    )
    return meta["tokens"]


def rendered(data: Path) -> tuple[list[str], list[str]]:
    """Prompts and answers of the file's records, in Stanford's words."""
    from minillama.chat import Conversation, Turn, render

    records = json.loads(data.read_text(encoding="utf-8"))
    pieces = [
        render("alpaca", Conversation((Turn(r["instruction"], r["output"], r["input"]),)))
        for r in records
    ]
    return [p[1].text for p in pieces], [p[2].text for p in pieces]


def transformers_fast(data: Path, tokenizer: Path) -> int:
    from transformers import LlamaTokenizer, LlamaTokenizerFast
    from transformers.convert_slow_tokenizer import convert_slow_tokenizer

    fast = LlamaTokenizerFast(
        tokenizer_object=convert_slow_tokenizer(LlamaTokenizer(str(tokenizer), legacy=True))
    )
    prompts, answers = rendered(data)
    tokens = 0
    for i in range(0, len(prompts), BATCH):
        heads, tails = prompts[i : i + BATCH], answers[i : i + BATCH]
        encoded = fast(
            [head + tail for head, tail in zip(heads, tails, strict=True)],
            return_offsets_mapping=True,
        )
        for ids, offsets, head in zip(
            encoded["input_ids"], encoded["offset_mapping"], heads, strict=True
        ):
            ids.append(2)
            mask = [int(end > len(head)) for _, end in offsets] + [1]
            assert len(mask) == len(ids)
            tokens += len(ids)
    return tokens


def one_by_one(data: Path, tokenizer: Path) -> int:
    """FastChat's and Stanford's way.

    The slow tokenizer, the prompt and the whole text of each record in turn.
    """
    from transformers import LlamaTokenizer

    slow = LlamaTokenizer(str(tokenizer), legacy=True)
    tokens = 0
    for head, tail in zip(*rendered(data), strict=True):
        ids = [*slow(head + tail)["input_ids"], 2]
        start = len(slow(head)["input_ids"])
        mask = [0] * start + [1] * (len(ids) - start)
        tokens += len(mask)
    return tokens


def measure(side: str, data: Path, tokenizer: Path) -> dict[str, float]:
    """Run one side in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--side",
        side,
        "--input",
        str(data),
        "--tokenizer",
        str(tokenizer),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def run_side(side: str, data: Path, tokenizer: Path) -> None:
    start, cpu = time.perf_counter(), time.process_time()
    tokens = (
        ours(data, tokenizer, int(side[4:]))
        if side.startswith("ours")
        else transformers_fast(data, tokenizer)
        if side == "fast"
        else one_by_one(data, tokenizer)
    )
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = time.process_time() - cpu + children.ru_utime + children.ru_stime
    status = Path(
        "/proc/self/status"
    ).read_text()  # getrusage would count the process that started this one, too
    own_kb = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(
        json.dumps(
            {
                "tokens": tokens,
                "wall": time.perf_counter() - start,
                "cpu": used,
                "peak_mb": max(own_kb, children.ru_maxrss) / 1024,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--sides", default="ours1,ours2,fast")
    parser.add_argument("--side")
    args = parser.parse_args()
    if args.side:
        run_side(args.side, args.input, args.tokenizer)
        return
    sides = args.sides.split(",")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "records.json"
        data.write_text(
            json.dumps(make_records(args.input, args.records), ensure_ascii=False, indent=1),
            encoding="utf-8",
        )
        runs = [
            {side: measure(side, data, args.tokenizer) for side in sides} for _ in range(args.pairs)
        ]
    print(
        f"{'':8}{'records/CPU s':>16}{'records/s':>12}{'spread of wall':>18}{'peak MB':>10}"
        f"{'tokens':>12}"
    )
    for side in sides:
        wall = [run[side]["wall"] for run in runs]
        cpu = statistics.median(run[side]["cpu"] for run in runs)
        print(
            f"{side:8}{args.records / cpu:16.0f}{args.records / statistics.median(wall):12.0f}"
            f"{min(wall):10.2f} - {max(wall):.2f}"
            f"{max(run[side]['peak_mb'] for run in runs):10.0f}{runs[0][side]['tokens']:12.0f}"
        )
    for side in sides[1:]:
        for what in ("cpu", "wall"):
            ratios = sorted(run[side][what] / run[sides[0]][what] for run in runs)
            print(
                f"{what:4} of {side} / {sides[0]}: median {statistics.median(ratios):.2f} ("
                f"{ratios[0]:.2f} to {ratios[-1]:.2f})"
            )


if __name__ == "__main__":
    main()
