"""The legs of benchmarks/cuda.py. Each runs in a process of its own and prints JSON at its end."""

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cuda_sides as sides
from minillama import device as devices
from minillama import ops, self_test
from minillama.generation.decode import Completion, decode
from minillama.generation.sampling import Sampling
from minillama.llama_config import LlamaConfig
from minillama.memory import device_memory
from minillama.model import Llama
from minillama.training.summary import throughput

Result = dict[str, Any]

# Dense bf16 TFLOP/s as NVIDIA publishes them, by a part of the card's name.
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "A10": 125.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}


@dataclass(frozen=True)
class Settings:
    """What all legs share."""

    device: torch.device
    shape: str  # of the leg; "tiny" to try the script itself
    rows: int  # of a batch
    length: int  # tokens of a row
    steps: int  # measured, after as many that are not
    side: str  # of a training leg

    @property
    def peak_tflops(self) -> float:
        """The card's; 0 if it is not in the table."""
        if self.device.type != "cuda":
            return 0.0
        name = torch.cuda.get_device_name(self.device)
        matches = [peak for part, peak in PEAK_TFLOPS.items() if part in name]
        return matches[0] if matches else 0.0


def machine(settings: Settings) -> Result:
    """What the figures were measured on."""
    found: Result = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if settings.device.type == "cuda":
        card = torch.cuda.get_device_properties(settings.device)
        found |= {
            "card": card.name,
            "memory_gb": round(card.total_memory / 1e9, 1),
            "capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda,
            "peak_tflops": settings.peak_tflops,
        }
    for package in ("triton", "transformers", "peft"):
        try:
            found[package] = __import__(package).__version__
        except ImportError:
            found[package] = None
    return found


def parity(settings: Settings) -> Result:
    """The doctor's checks: every op and a model, against the formulas on the CPU."""
    wrong = []
    for dtype in self_test.LIMITS:
        if not self_test.check_model(settings.device, dtype, ""):
            wrong.append(f"model, {dtype}")
        ops.choose("")
        for case in self_test.cases(dtype):
            if not self_test.check_op(case, settings.device, dtype):
                wrong.append(f"{case.name}, {dtype}")
    return {"wrong": wrong}


def random_tokens(settings: Settings, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    vocab_size = sides.shape_config(settings.shape).vocab_size
    size = (settings.rows, settings.length + 1)
    return torch.randint(0, vocab_size, size, generator=generator).to(settings.device)


def measure(settings: Settings, step: Callable[[Tensor], float]) -> Result:
    """Speed, memory and losses of `steps` steps, after as many that are not timed."""
    losses = [step(random_tokens(settings, number)) for number in range(settings.steps)]
    devices.synchronize(settings.device)
    started = time.perf_counter()
    for number in range(settings.steps, 2 * settings.steps):
        losses.append(step(random_tokens(settings, number)))
    devices.synchronize(settings.device)
    seconds = (time.perf_counter() - started) / settings.steps
    tokens_per_second = settings.rows * settings.length / seconds
    config = sides.shape_config(settings.shape)
    speed = throughput(config, tokens_per_second, [settings.length], settings.peak_tflops)
    return {
        "tokens_per_second": tokens_per_second,
        "ms_a_step": 1e3 * seconds,
        "mfu": speed["mfu"],
        "peak_bytes": device_memory(settings.device).peak,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def train(settings: Settings) -> Result:
    """A side's training steps. side: minillama, transformers or loop, then "+compile", "+zeroN"
    or "+recompute".
    """
    name, _, option = settings.side.partition("+")
    compiled = option == "compile"
    if name == "transformers":
        return measure(settings, sides.transformers_step(settings.shape, settings.device, compiled))
    if name == "loop":
        return measure(settings, sides.loop_step(settings.shape, settings.device, compiled))
    zero_stage = int(option[-1]) if option.startswith("zero") else 0
    step = sides.our_step(
        settings.shape, settings.device, compiled, option == "recompute", zero_stage
    )
    return measure(settings, step)


def attention(settings: Settings) -> Result:
    """Packed documents: our groups of rows, one kernel call with a mask, and the longest row."""
    config = sides.shape_config(settings.shape)
    generator = torch.Generator().manual_seed(0)
    total = settings.rows * settings.length
    lengths = []
    while sum(lengths) < total:
        length = int(torch.randint(16, settings.length, (1,), generator=generator))
        lengths.append(min(length, total - sum(lengths)))
    shape = (1, total, config.n_heads, config.head_dim)
    q, k, v = (
        torch.randn(shape, generator=generator).to(settings.device, torch.bfloat16)
        for _ in range(3)
    )
    documents = ops.Documents(lengths, settings.device)
    mask = ops.reference.document_mask(documents).to(settings.device)

    def packed() -> Tensor:
        return ops.attention(q, k, v, documents)

    def masked() -> Tensor:
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)

    difference = (packed() - masked()).float().norm() / masked().float().norm()
    return {
        "documents": len(lengths),
        "tokens": total,
        "packed_ms": milliseconds(settings, packed),
        "masked_ms": milliseconds(settings, masked),
        "difference": float(difference),
    }


def milliseconds(settings: Settings, function: Callable[[], Any]) -> float:
    """The median of ten calls after three."""
    seconds = []
    for _ in range(13):
        devices.synchronize(settings.device)
        started = time.perf_counter()
        function()
        devices.synchronize(settings.device)
        seconds.append(time.perf_counter() - started)
    return 1e3 * sorted(seconds[3:])[5]


@torch.inference_mode()
def decoding(settings: Settings) -> Result:
    """Greedy tokens a second of one text and of a batch of eight, beside transformers."""
    config = sides.shape_config(settings.shape)
    model = sides.first_weights(settings.shape, settings.device).eval()
    prompt = list(range(3, 3 + min(64, settings.length // 2)))
    new_tokens = min(128, settings.length // 2)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    found: Result = {"weights_gb": weights / 1e9}
    ours = {}
    for batch in (1, 8):
        prompts = [[1 + row, *prompt] for row in range(batch)]
        ours[batch] = greedy(model, prompts, new_tokens)  # not timed
        started = time.perf_counter()
        greedy(model, prompts, new_tokens)
        seconds = time.perf_counter() - started
        found[f"batch_{batch}"] = batch * new_tokens / seconds
    found["gb_per_second"] = found["batch_1"] * weights / 1e9
    del model
    gc.collect()
    return found | their_decoding(settings, config, prompt, new_tokens)


def greedy(model: Llama, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    completions = [Completion(prompt, new_tokens) for prompt in prompts]
    for _ in decode(model, completions, Sampling(temperature=0.0), (), None):
        pass
    return [completion.ids for completion in completions]


def their_decoding(
    settings: Settings, config: LlamaConfig, prompt: list[int], new_tokens: int
) -> Result:
    """transformers' generate, with its default cache; {} where it is not installed."""
    try:
        from transformers import LlamaConfig as TheirConfig
        from transformers import LlamaForCausalLM
    except ImportError:
        return {"peer": "transformers is not installed"}
    model = LlamaForCausalLM(TheirConfig(**sides.to_hf(config), attn_implementation="sdpa"))
    model = model.bfloat16().to(settings.device).eval()
    model.load_state_dict(sides.first_weights(settings.shape, settings.device).state_dict())
    found: Result = {"peer": "transformers"}
    lengths = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    for batch in (1, 8):
        rows = [[1 + row, *prompt] for row in range(batch)]
        ids = torch.tensor(rows, device=settings.device)
        for _ in range(2):  # the first is not timed
            started = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths)
            devices.synchronize(settings.device)
            seconds = time.perf_counter() - started
        found[f"peer_batch_{batch}"] = batch * new_tokens / seconds
    return found


LEGS: dict[str, Callable[[Settings], Result]] = {
    "machine": machine,
    "parity": parity,
    "train": train,
    "attention": attention,
    "decoding": decoding,
}
