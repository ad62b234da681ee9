"""Generation beside transformers and litgpt, and beside the bound that memory sets.

Reading a prompt, decoding, a ragged batch, beams, and the start of the process.

    python benchmarks/generation.py                            # 110M, fp32 and bf16
    python benchmarks/generation.py --models 15m,110m,1.1b --rounds 7
    python benchmarks/generation.py --startup             from a new process to the first token

Random weights, the same on all sides; greedy; sides take turns. Each decodes `--tokens` after a
prompt of `--prompt` tokens, the batch eight prompts of 1/8, 2/8, … of it (transformers pads them on
the left; ours computes no padding). Reading the prompt is timed by itself and taken off. `bound` is
a loop of nothing but torch's matrix-vector products over the same weights, one a linear and token:
what decoding costs if all else were free. litgpt takes part where it is installed.

Figures are tokens a second by the wall clock and by the CPU's, medians over the rounds with
the smallest and largest, and the median of ours over theirs within a round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minillama import ops
from minillama.checkpoint.hf_writer import save_model
from minillama.generation.beam import BeamOptions, beam_search
from minillama.generation.decode import Completion, decode
from minillama.generation.sampling import Sampling
from minillama.hf_config import published, to_hf
from minillama.int8_layers import quantize_linear
from minillama.llama_config import LlamaConfig
from minillama.model import Llama

ROOT = Path(__file__).resolve().parent.parent
GREEDY = Sampling(0.0, 0, 1.0)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def shape(name: str) -> LlamaConfig:
    if name in ("15m", "110m"):
        return published(name)
    return replace(
        published("110m"),
        dim=2048,
        n_layers=22,
        n_heads=32,
        n_kv_heads=4,
        head_dim=64,
        ffn_dim=5632,
        max_seq_len=2048,
    )


class Ours:
    """As an engine does it: the weights are packed before the first completion."""

    def __init__(self, model: Llama) -> None:
        self.model = deepcopy(model)

    def run(self, prompts: list[list[int]], tokens: int, beams: int) -> None:
        ops.pack_weights(self.model, len(prompts) * beams)
        if beams > 1:
            done = list(
                beam_search(
                    self.model,
                    [Completion(prompts[0], tokens)],
                    BeamOptions(beams, early_stopping="never"),
                    GREEDY,
                )
            )
        else:
            done = list(
                decode(self.model, [Completion(prompt, tokens) for prompt in prompts], GREEDY)
            )
        assert all(len(answer.ids) == tokens for answer in done)


class Int8(Ours):
    """The same weights, rounded to int8; see docs/int8.md."""

    def __init__(self, model: Llama) -> None:
        self.model = deepcopy(model).to(torch.bfloat16)
        for name, _ in list(self.model.named_parameters()):
            quantize_linear(self.model, name)


class Transformers:
    """generate(), with the default or the static cache."""

    def __init__(self, model: Llama, cache: str) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        self.cache = cache
        with torch.device("meta"):
            self.model = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**to_hf(model.config))
            )
        self.model.load_state_dict(model.state_dict(), assign=True)  # the same tensors
        rotary = self.model.model.rotary_emb
        self.model.model.rotary_emb = type(rotary)(self.model.config)
        self.model.eval().generation_config.pad_token_id = 0

    def run(self, prompts: list[list[int]], tokens: int, beams: int) -> None:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        static = (
            {"cache_implementation": "static", "disable_compile": True}
            if self.cache == "static"
            else {}
        )
        out = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=beams,
            eos_token_id=None,
            early_stopping="never" if beams > 1 else False,
            **static,
        )
        assert out.shape[1] == width + tokens


class LitGPT:
    """litgpt.generate, one prompt at a time."""

    def __init__(self, model: Llama) -> None:
        from litgpt import GPT, Config
        from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama

        c = model.config
        config = Config(
            name="benchmark",
            block_size=c.max_seq_len,
            vocab_size=c.vocab_size,
            padded_vocab_size=c.vocab_size,
            n_layer=c.n_layers,
            n_head=c.n_heads,
            n_query_groups=c.n_kv_heads,
            n_embd=c.dim,
            head_size=c.head_dim,
            intermediate_size=c.ffn_dim,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            norm_eps=c.norm_eps,
            rope_base=int(c.rope_theta),
        )
        self.model, weights = GPT(config), {}
        copy_weights_hf_llama(config, {}, weights, dict(model.state_dict()))
        self.model.load_state_dict(weights, assign=True, strict=False)
        self.model.eval()

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], tokens: int, beams: int) -> None:
        from litgpt.generate.base import generate

        for prompt in prompts:
            self.model.max_seq_length = len(prompt) + tokens
            self.model.set_kv_cache(batch_size=1, dtype=self.model.lm_head.weight.dtype)
            generate(
                self.model,
                torch.tensor(prompt),
                len(prompt) + tokens,
                temperature=0.0,
                top_k=None,
                top_p=1.0,
            )
            self.model.clear_kv_cache()


class Bound:
    """Compute only the matrix-vector products of `tokens` tokens, for all prompts together."""

    def __init__(self, model: Llama) -> None:
        self.weights = [
            p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name
        ]

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], tokens: int, beams: int) -> None:
        if tokens == 1:
            return
        rows = max(len(prompts), beams)
        inputs = {w.shape[1]: torch.randn(rows, w.shape[1], dtype=w.dtype) for w in self.weights}
        for _ in range(tokens - 1):
            for w in self.weights:
                torch.mv(w, inputs[w.shape[1]][0]) if rows == 1 else torch.nn.functional.linear(
                    inputs[w.shape[1]], w
                )


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    began, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - began, time.process_time() - cpu


def compare(name: str, dtype: str, options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = (
        Llama(shape(name))
        .initialise(torch.Generator().manual_seed(0))
        .to(DTYPES[dtype])
        .eval()
        .requires_grad_(False)
    )
    made: dict[str, Callable[[], object]] = {
        "minillama": lambda: Ours(model),
        "minillama int8": lambda: Int8(model),
        "transformers": lambda: Transformers(model, "default"),
        "transformers static": lambda: Transformers(model, "static"),
        "bound": lambda: Bound(model),
    }
    if find_spec("litgpt"):
        made["litgpt"] = lambda: LitGPT(model)
    sides = {side: make() for side, make in made.items()}
    whole = torch.randint(
        3, model.config.vocab_size, (options.prompt,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    ragged = [whole[i:][: max(1, options.prompt * (i + 1) // 8)] for i in range(8)]
    for case, prompts, beams in (
        ("one", [whole], 1),
        ("batch of 8", ragged, 1),
        ("beam 4", [whole], 4),
    ):
        if case.split()[0] not in options.cases.split(","):
            continue
        taking = {
            side: one
            for side, one in sides.items()
            if not (side == "litgpt" and case != "one")
            and not (side == "transformers static" and case == "beam 4")
        }
        reading, writing = {side: [] for side in taking}, {side: [] for side in taking}
        for number in range(options.rounds + 1):
            for side, one in taking.items():
                first = timed(lambda: one.run(prompts, 1, beams))  # noqa: B023 (run at once)
                both = timed(lambda: one.run(prompts, 1 + options.tokens, beams))  # noqa: B023
                if number:  # the first round warms up
                    reading[side].append([sum(map(len, prompts)) / max(x, 1e-9) for x in first])
                    writing[side].append(
                        [
                            len(prompts) * options.tokens / max(b - a, 1e-9)
                            for a, b in zip(first, both, strict=True)
                        ]
                    )
        show(f"{name} {dtype}, {case}: decoding", writing)
        show(
            f"{name} {dtype}, {case}: reading",
            {side: rates for side, rates in reading.items() if side != "bound"},
        )


def show(title: str, rates: dict[str, list]) -> None:
    print(f"\n{title:36}{'tokens / s':>28}{'tokens / CPU s':>28}{'ours is, wall':>20}{'CPU':>18}")
    for side, found in rates.items():
        ratios = [
            [mine[i] / theirs[i] for mine, theirs in zip(rates["minillama"], found, strict=True)]
            for i in (0, 1)
        ]
        print(
            f"{side:36}{spread([f[0] for f in found], 1):>28}"
            f"{spread([f[1] for f in found], 1):>28}{spread(ratios[0]):>20}"
            f"{spread(ratios[1]):>18}",
            flush=True,
        )


def spread(values: list[float], digits: int = 2) -> str:
    median = statistics.median(values)
    return f"{median:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


THEIR_START = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
prompt = torch.tensor([[1, 5, 9]])
ids = model.generate(prompt, max_new_tokens=1, do_sample=False, pad_token_id=0)
print(ids[0, -1].item())
"""


def startup(options: argparse.Namespace) -> None:
    """Measure the seconds from a new process to the first token of a 15M model.

    The peer is a script that does the same with transformers.
    """
    with tempfile.TemporaryDirectory() as directory:
        save_model(
            Llama(shape("15m")).initialise(torch.Generator().manual_seed(0)), Path(directory)
        )
        tokenizer = ROOT / "tests/golden/model/tokenizer.model"
        ours = [
            sys.executable,
            "generate.py",
            "--ckpt",
            directory,
            "--tokenizer",
            str(tokenizer),
            "--prompt_ids",
            "1 5 9",
            "--greedy",
            "--ignore_eos",
            "--max_new_tokens",
            "1",
        ]
        commands = {
            "minillama": ours,
            "transformers": [sys.executable, "-c", THEIR_START, directory],
        }
        found: dict[str, list[float]] = {side: [] for side in commands}
        for number in range(options.rounds + 1):
            for side, command in commands.items():
                began = time.perf_counter()
                subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
                if number:
                    found[side].append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(found["minillama"], found["transformers"], strict=True)]
    for side, seconds in found.items():
        print(f"{side:14} start to first token {spread(seconds)} s")
    print(f"ours is {spread(ratios)} of theirs")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="110m", help="of 15m, 110m, 1.1b")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--cases", default="one,batch,beam")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument(
        "--startup",
        action="store_true",
        help="only the time from a fresh process to the first token",
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    versions = {package: __import__(package).__version__ for package in ("torch", "transformers")}
    print(
        f"{json.dumps(versions)}, {torch.get_num_threads()} threads"
        + ("" if find_spec("litgpt") else ", litgpt is not installed")
    )
    if options.startup:
        startup(options)
        return
    for name in options.models.split(","):
        for dtype in options.dtypes.split(","):
            compare(name, dtype, options)


if __name__ == "__main__":
    main()
