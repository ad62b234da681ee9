"""The sides of benchmarks/cuda.py: one training step of a LLaMA, written by us and by others.

    minillama       16-bit weights with fp32 masters (our optimizer), our ops
    transformers    fp32 weights under torch.autocast, torch's fused AdamW: its Trainer's bf16=True
    loop            the same over our model with the plain formulas and whole logits: what is named
                    in place of transformers where that is not installed

All take the same batches from the same weights: those of `Llama.initialise`, rounded to bf16. A
compiled side has each of its layers compiled by torch.compile; ours then uses the plain formulas of
the elementwise ops, so that the compiler can fuse them.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillama import ops
from minillama.comm import Mesh
from minillama.grid import make_grid
from minillama.hf_config import published, to_hf
from minillama.llama_config import LlamaConfig
from minillama.model import Llama
from minillama.parallel.sharded_optimizer import ShardedOptimizer
from minillama.train_config import TrainConfig
from minillama.training.model_building import recompute_activations

LEARNING_RATE = 1e-5
FUSED_BY_COMPILER = "rms_norm=reference,rope=reference,swiglu=reference,linear=reference"
TINY = LlamaConfig(
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    ffn_dim=160,
    vocab_size=512,
    max_seq_len=256,
    norm_eps=1e-5,
    rope_theta=10000.0,
)

Step = Callable[[Tensor], float]  # tokens (B, T + 1) -> the loss before the step


def shape_config(shape: str) -> LlamaConfig:
    return TINY if shape == "tiny" else published(shape)


def first_weights(shape: str, device: torch.device) -> Llama:
    """The weights that every side begins with, in bf16, made on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Llama(shape_config(shape))
    finally:
        torch.set_default_dtype(before)
    return model.initialise(torch.Generator(device).manual_seed(0))


def compile_layers(layers: nn.ModuleList) -> None:
    """Compile each layer by itself: one compilation serves all, since they are alike."""
    for layer in layers:
        layer.compile(dynamic=False)


def compile_ours(model: Llama) -> None:
    """Compile our layers. Before, a call selects the ops: that logs, which cannot be compiled."""
    device = model.lm_head.weight.device
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.int64, device=device))
    compile_layers(model.model.layers)


def our_step(
    shape: str, device: torch.device, compiled: bool, recompute: bool = False, zero_stage: int = 0
) -> Step:
    model = first_weights(shape, device)
    if recompute:
        recompute_activations(model.model.layers)
    if compiled:
        ops.choose(FUSED_BY_COMPILER)
        compile_ours(model)
    settings = TrainConfig(precision="bf16", zero_stage=zero_stage)
    grid = make_grid(Mesh(device=device))
    optimizer = ShardedOptimizer(model.named_parameters(), grid, settings)

    def step(tokens: Tensor) -> float:
        optimizer.zero_grad()
        labels = tokens[:, 1:].contiguous()
        loss = model.loss_sum(tokens[:, :-1].contiguous(), labels) / labels.numel()
        optimizer.backward(loss, 1)
        optimizer.step(LEARNING_RATE, 1.0)
        return loss.item()

    return step


def transformers_step(shape: str, device: torch.device, compiled: bool) -> Step:
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    settings = to_hf(shape_config(shape))
    model = LlamaForCausalLM(TheirConfig(**settings, attn_implementation="sdpa"))
    model = model.float().to(device).train()
    model.load_state_dict(first_weights(shape, device).state_dict())
    model.config.use_cache = False
    if compiled:
        compile_layers(model.model.layers)

    def loss_of(tokens: Tensor) -> Tensor:
        logits = model(input_ids=tokens[:, :-1]).logits
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    return with_torch_adamw(model, loss_of, device)


def loop_step(shape: str, device: torch.device, compiled: bool) -> Step:
    """A loop as one writes it by hand: our modules with plain formulas, torch's optimizer."""
    ops.choose("reference")
    ops.attention.choose("fused")  # torch's scaled_dot_product_attention
    model = first_weights(shape, device).float()
    if compiled:
        compile_ours(model)

    def loss_of(tokens: Tensor) -> Tensor:
        logits = model.logits(model(tokens[:, :-1]))
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    return with_torch_adamw(model, loss_of, device)


def with_torch_adamw(
    model: nn.Module, loss_of: Callable[[Tensor], Tensor], device: torch.device
) -> Step:
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=0.0, fused=True
    )

    def step(tokens: Tensor) -> float:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    return step
