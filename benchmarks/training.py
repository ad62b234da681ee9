"""Whole training steps beside transformers, peft and litgpt: speed and memory.

    python benchmarks/training.py --shape 15m --litgpt_python PYTHON
    python benchmarks/training.py --shape 110m --rounds 5 --steps 2

Three recipes: full training; LoRA of rank 8 on q and v; LoRA of rank 16 on all seven linears. Every
side takes the same step in fp32 from the same weights on the same random tokens: forward, mean
cross entropy over all positions, backward, clipping at norm 1, fused AdamW. A side whose last loss
is another is void. Each measurement is a fresh process (so its
peak is its own), sides take turns, and a first step is not counted. litgpt pins other versions of
some packages: install it in an environment of its own (`pip install litgpt torch==2.13.0`) and name
that interpreter.

The bytes kept are those of the storages, parameters aside, that autograd saves in one forward: our
ops and the reference formulas.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

RECIPES = {"full": 0, "lora_qv": 8, "lora_all": 16}  # rank
LOSS_TOLERANCE = 1e-4  # between the last losses of two sides
PEERS = {
    "full": ("transformers", "litgpt"),
    "lora_qv": ("peft", "litgpt"),
    "lora_all": ("peft", "litgpt"),
}


def initial_weights(shape: str) -> dict[str, Tensor]:
    """The weights that every side starts from."""
    from minillama.hf_config import published
    from minillama.model import Llama

    return dict(Llama(published(shape)).initialise(torch.Generator().manual_seed(0)).state_dict())


def our_model(shape: str, recipe: str) -> nn.Module:
    from minillama.hf_config import published
    from minillama.lora import LINEARS, LoraConfig, add_lora
    from minillama.model import Llama

    model = Llama(published(shape)).initialise(torch.Generator().manual_seed(0))
    if rank := RECIPES[recipe]:
        add_lora(
            model,
            LoraConfig(
                rank=rank,
                alpha=2.0 * rank,
                targets=("q_proj", "v_proj") if recipe == "lora_qv" else LINEARS,
            ),
        )
    return model


def minillama(shape: str, recipe: str) -> Callable[[Tensor], float]:
    from minillama.comm import Mesh
    from minillama.grid import make_grid
    from minillama.parallel.sharded_optimizer import ShardedOptimizer
    from minillama.train_config import TrainConfig

    model = our_model(shape, recipe)
    optimizer = ShardedOptimizer(model.named_parameters(), make_grid(Mesh()), TrainConfig())

    def step(tokens: Tensor) -> float:
        optimizer.zero_grad()
        loss = model.loss_sum(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        optimizer.backward(loss, 1)
        optimizer.step(1e-5, 1.0)
        return loss.item()

    return step


def transformers(shape: str, recipe: str) -> Callable[[Tensor], float]:
    """transformers' model, inside peft's where the recipe is a LoRA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from minillama.hf_config import published, to_hf
    from minillama.lora import LINEARS

    model = LlamaForCausalLM(LlamaConfig(**to_hf(published(shape))))
    model.load_state_dict(initial_weights(shape))
    if rank := RECIPES[recipe]:
        import peft

        targets = ["q_proj", "v_proj"] if recipe == "lora_qv" else list(LINEARS)
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets),
        )

    def loss_of(tokens: Tensor) -> Tensor:
        return model(
            input_ids=tokens[:, :-1], labels=tokens[:, :-1], shift_labels=tokens[:, 1:].contiguous()
        ).loss

    return with_torch_adamw(model.train(), loss_of)


def litgpt(shape: str, recipe: str) -> Callable[[Tensor], float]:
    """litgpt's model with its own chunked head and loss, as its fine-tuning scripts call them."""
    from litgpt import lora, model
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy

    from minillama.hf_config import published

    c, rank = published(shape), RECIPES[recipe]
    settings = {
        "block_size": 512,
        "vocab_size": c.vocab_size,
        "padded_vocab_size": c.vocab_size,
        "n_layer": c.n_layers,
        "n_head": c.n_heads,
        "n_embd": c.dim,
        "intermediate_size": c.ffn_dim,
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "mlp_class_name": "LLaMAMLP",
        "norm_eps": c.norm_eps,
    }
    if rank:
        others = {f"lora_{part}": recipe == "lora_all" for part in ("key", "projection", "mlp")}
        adapted = lora.Config(
            **settings,
            lora_r=rank,
            lora_alpha=2 * rank,
            lora_dropout=0.0,
            lora_query=True,
            lora_value=True,
            **others,
        )
        net = lora.GPT(adapted)
        lora.mark_only_lora_as_trainable(net)
    else:
        net = model.GPT(model.Config(**settings))
    weights: dict[str, Tensor] = {}
    copy_weights_hf_llama(net.config, {}, weights, initial_weights(shape))
    net.load_state_dict(weights, strict=False)  # what it lacks are the new LoRA factors

    def loss_of(tokens: Tensor) -> Tensor:
        return chunked_cross_entropy(
            net(tokens[:, :-1], lm_head_chunk_size=128), tokens[:, 1:].contiguous()
        )

    return with_torch_adamw(net, loss_of)


def with_torch_adamw(
    model: nn.Module, loss_of: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], float]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, weight_decay=0.0, fused=True)

    def step(tokens: Tensor) -> float:
        optimizer.zero_grad()
        loss = loss_of(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        return loss.item()

    return step


def random_tokens(options: argparse.Namespace, number: int) -> Tensor:
    return torch.randint(
        0,
        32000,
        (options.batch, options.tokens + 1),
        generator=torch.Generator().manual_seed(number),
    )


def run_side(side: str, options: argparse.Namespace) -> None:
    """One side in this process; prints what it measured, as JSON."""
    torch.set_num_threads(options.threads)
    build = {
        "minillama": minillama,
        "transformers": transformers,
        "peft": transformers,
        "litgpt": litgpt,
    }[side]
    step = build(options.shape, options.recipe)
    cpu, wall, loss = 0.0, 0.0, 0.0
    for number in range(options.steps + 1):
        tokens = random_tokens(options, number)
        cpu_began, began = time.process_time(), time.perf_counter()
        loss = step(tokens)
        if number:
            cpu, wall = cpu + time.process_time() - cpu_began, wall + time.perf_counter() - began
    total = options.batch * options.tokens * options.steps
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(
        json.dumps(
            {"per_cpu_second": total / cpu, "per_second": total / wall, "peak": peak, "loss": loss}
        )
    )


def count_kept(options: argparse.Namespace) -> None:
    """Prints the bytes of the storages that autograd keeps in one forward, parameters aside."""
    model, tokens, kept = our_model(options.shape, options.recipe), random_tokens(options, 0), {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x  # held, so no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.loss_sum(tokens[:, :-1], tokens[:, 1:])
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    print(
        json.dumps(
            sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in parameters)
        )
    )


def fresh(side: str, options: argparse.Namespace, recipe: str, ops: str = "auto") -> dict | int:
    python = options.litgpt_python if side == "litgpt" else sys.executable
    given = [
        f"--{name}={getattr(options, name)}"
        for name in ("shape", "tokens", "batch", "steps", "threads")
    ]
    done = subprocess.run(
        [python, __file__, "--side", side, "--recipe", recipe, *given],
        capture_output=True,
        text=True,
        env=os.environ | {"MINILLAMA_OPS": ops, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{side}, {recipe}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(recipe: str, options: argparse.Namespace) -> None:
    sides = [
        side for side in ("minillama", *PEERS[recipe]) if side != "litgpt" or options.litgpt_python
    ]
    found: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side in sides:
            found[side].append(fresh(side, options, recipe))
    print(f"\n{recipe}{f', rank {RECIPES[recipe]}' if RECIPES[recipe] else ''}")
    print(
        f"{'':14}{'tokens / CPU s':>22}{'ours is, by CPU time':>26}{'tokens / s':>22}"
        f"{'peak GB':>18}{'ours is':>10}{'loss':>10}"
    )
    ours = found["minillama"]
    for side, runs in found.items():
        ratios = [
            a["per_cpu_second"] / b["per_cpu_second"] for a, b in zip(ours, runs, strict=True)
        ]
        memory = statistics.median(a["peak"] / b["peak"] for a, b in zip(ours, runs, strict=True))
        print(
            f"{side:14}{spread([r['per_cpu_second'] for r in runs]):>22}"
            f"{spread(ratios, 2) + ' x':>26}"
            f"{spread([r['per_second'] for r in runs]):>22}"
            f"{spread([r['peak'] for r in runs], 2):>18}{memory:>8.2f} x"
            f"{runs[-1]['loss']:>10.5f}{verdict(ours, runs)}"
        )
    kept, formulas = (fresh("kept", options, recipe, ops) for ops in ("auto", "reference"))
    print(
        f"kept for backward: {kept / 1e6:.1f} MB, reference ops {formulas / 1e6:.1f} MB: "
        f"{kept / formulas:.2f} x",
        flush=True,
    )


def verdict(ours: list[dict], theirs: list[dict]) -> str:
    """Void if the last losses differ: then the sides did different work."""
    difference = abs(ours[-1]["loss"] - theirs[-1]["loss"])
    return "" if difference <= LOSS_TOLERANCE else "  void"


def spread(values: list[float], digits: int = 0) -> str:
    median = statistics.median(values)
    return f"{median:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="15m")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--tokens", type=int, default=512, help="of a row")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument(
        "--steps", type=int, default=4, help="of a measurement, after one of warm-up"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="1: CPU time means work, not waiting for the other thread",
    )
    parser.add_argument(
        "--litgpt_python",
        default="",
        help="an interpreter with litgpt; without it that side is left out",
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--recipe", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side == "kept":
        count_kept(options)
    elif options.side:
        run_side(options.side, options)
    else:
        print(
            f"{options.shape}, fp32, {options.batch} rows of {options.tokens} tokens, "
            f"{options.threads} threads, "
            f"torch {torch.__version__}; medians of {options.rounds} rounds of {options.steps} "
            "steps (smallest–largest)"
        )
        for recipe in options.recipes.split(","):
            report(recipe, options)


if __name__ == "__main__":
    main()
