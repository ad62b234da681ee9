"""What takes the place of ZeRO stage 3, in bytes.

Stage 3 shards the weights too: each of N ranks holds 1/N of all, and gathers each layer when it
computes it. Here tensor ranks hold 1/T of each layer and compute with that, so nothing is gathered;
stage 2 shards gradients and the optimizer's state over the other ranks.

    on N = T · D ranks, bytes a rank, a 16-bit model, all parameters P trained
        stage 3                    18 P / N
        T tensor ranks, stage 2    2 P / T + 16 P / N
"""

import math
from dataclasses import replace

from minillama.errors import UserError
from minillama.llama_config import LlamaConfig
from minillama.parallel.tensor import cut_sizes
from minillama.train_config import TrainConfig
from minillama.training.architecture import find_base, model_config
from minillama.training.estimate import MOST_TENSOR_RANKS, Place, estimate
from minillama.training.summary import gigabytes

RANKS_OF_PLAN = 8  # if the command names no number of ranks


def refuse_zero3(config: TrainConfig, world_size: int) -> None:
    """Raise UserError with what to type instead. config: the settings with stage 2."""
    problem = "zero_stage = 3: weights are not sharded here over data ranks"
    try:
        llama = model_config(config, find_base(config))
    except UserError:  # of a model that is not known, no bytes can be counted
        raise UserError(
            f"{problem}; --zero_stage 2 --tensor_parallel N holds 1/N of them on each rank"
        ) from None
    ranks = world_size if world_size > 1 else RANKS_OF_PLAN
    tensors = _most_tensor_ranks(llama, ranks)
    whole = estimate(llama, replace(config, zero_stage=0))
    place = Place(tensor=tensors - 1, tensors=tensors)
    needed = estimate(llama, config, ranks, place).total
    raise UserError(
        f"{problem}; --zero_stage 2 --tensor_parallel {tensors} on {ranks} ranks needs "
        f"{needed:,} bytes a rank ({gigabytes(needed)}) before activations, stage 3 "
        f"{whole.total // ranks:,}"
    )


def _most_tensor_ranks(llama: LlamaConfig, ranks: int) -> int:
    """As many as the model and the ranks can be divided by, on one machine."""
    divisor = math.gcd(*cut_sizes(llama).values(), ranks)
    possible = [count for count in range(1, MOST_TENSOR_RANKS + 1) if divisor % count == 0]
    return max(possible)
