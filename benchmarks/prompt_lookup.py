"""Prompt lookup beside greedy decoding, here and in transformers, on a real model.

    python benchmarks/prompt_lookup.py --ckpt SMOLLM2_DIR --data alpaca.json --threads 2

The prompts are those of the records with the longest inputs: texts to correct, shorten or answer
questions about, whose words return in the answer. Each side writes the greedy answer of one prompt
at a time, with the checkpoint's own chat template, and the same number of tokens. A figure is the
median over the prompts; "same" counts the prompts whose tokens are those of our greedy decoding.
benchmarks/real_model.py fetches the model. OMP_WAIT_POLICY=passive is what generate.py chooses.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from minillama.generation.config import GenerationConfig
from minillama.generation.engine import Engine
from minillama.generation.loading import LoadOptions, load_engine


def prompts_of(engine: Engine, data: Path, count: int) -> list[list[int]]:
    """The prompts of the records with the longest inputs, as token ids."""
    records = json.loads(data.read_text(encoding="utf-8"))
    records.sort(key=lambda record: len(record.get("input") or ""), reverse=True)
    texts = [f"{record['instruction']}\n\n{record['input']}" for record in records[:count]]
    return [engine.encode_prompt(text) for text in texts]


def ours(options: argparse.Namespace, num_guesses: int) -> Callable[[list[int]], list[int]]:
    config = GenerationConfig(
        greedy=True,
        ignore_eos=True,
        max_new_tokens=options.tokens,
        prompt_lookup=num_guesses,
    )
    engine = load_engine(LoadOptions(options.ckpt, dtype=options.dtype), config)

    def complete(prompt: list[int]) -> list[int]:
        completion = engine.new_completion(prompt)
        for _ in engine.stream([completion], seed=None):
            pass
        return completion.ids

    return complete


def theirs(options: argparse.Namespace, num_guesses: int) -> Callable[[list[int]], list[int]]:
    import transformers

    transformers.logging.set_verbosity_error()
    dtype = getattr(torch, options.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.ckpt, dtype=dtype).eval()
    settings = {"prompt_lookup_num_tokens": num_guesses} if num_guesses else {}

    def complete(prompt: list[int]) -> list[int]:
        done = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=options.tokens,
            do_sample=False,
            eos_token_id=-1,  # no token, so it never ends early; prompt lookup refuses None
            pad_token_id=0,
            **settings,
        )
        return done[0, len(prompt) :].tolist()

    return complete


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--data", type=Path, required=True, help="records with inputs")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--guesses", type=int, default=10, help="tokens that a step guesses")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sides = {
        "greedy": ours(options, 0),
        "prompt lookup": ours(options, options.guesses),
        "transformers, greedy": theirs(options, 0),
        "transformers, prompt lookup": theirs(options, options.guesses),
    }
    engine = load_engine(LoadOptions(options.ckpt), GenerationConfig())
    prompts = prompts_of(engine, options.data, options.prompts + 1)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    answers: dict[str, list[list[int]]] = {side: [] for side in sides}
    for number, prompt in enumerate(prompts):
        for side, complete in sides.items():
            began = time.perf_counter()
            answer = complete(prompt)
            if number > 0:  # the first prompt warms up
                seconds[side].append(time.perf_counter() - began)
                answers[side].append(answer)
    lengths = [len(prompt) for prompt in prompts[1:]]
    print(
        f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens, answers of "
        f"{options.tokens}, {options.dtype}, {options.threads} threads, torch {torch.__version__}"
    )
    for side, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds["prompt lookup"], strict=True)]
        pairs = zip(answers[side], answers["greedy"], strict=True)
        same = sum(answer == expected for answer, expected in pairs)
        print(
            f"{side:30}{statistics.median(taken):6.2f} s an answer   prompt lookup is "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) times as fast"
            f"   same {same} of {len(taken)}"
        )


if __name__ == "__main__":
    main()
