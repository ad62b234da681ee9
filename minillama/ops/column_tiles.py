"""Weights in tiles of columns: the product of one row with them runs at the memory's speed.

    y = W x = sum over j of x_j * W[:, j]

is a sum of the columns of W, each multiplied by its x_j. torch's `embedding_bag` computes such sums
of rows of a table. It was made for recommendation models, whose tables are far larger than any
cache, so its kernel (FBGEMM's) does little but read memory. Here the rows of the table are pieces
of columns of W. A tile is a block of rows of W, transposed:

    W (4, 3)    a b c        tiles (2, 3, 2)    a d   g j
                d e f                           b e   h k
                g h i                           c f   i l
                j k l

The sum over the rows of a tile is a bag. Threads share the bags, and each reads its tiles from the
first byte to the last. Sums are fp32 for every dtype.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTHS = (256, 128, 64, 32)  # of a tile; the wider, the fewer indices there are to read
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def can_tile(weight: Tensor) -> bool:
    """Whether W (out, in) can be cut into tiles, and the kernel is there to multiply them."""
    if weight.device.type != "cpu" or weight.dtype not in DTYPES:
        return False
    has_kernel = "fbgemm" in torch.backends.quantized.supported_engines
    return has_kernel and _width_for(len(weight)) != 0


def _width_for(num_outputs: int) -> int:
    """The largest width that divides the rows of W; 0: none does."""
    for width in WIDTHS:
        if num_outputs % width == 0:
            return width
    return 0


def cut(weight: Tensor) -> Tensor:
    """W (out, in) as tiles (out / width, in, width)."""
    num_outputs, num_inputs = weight.shape
    return weight.view(-1, _width_for(num_outputs), num_inputs).transpose(1, 2).contiguous()


def join(tiles: Tensor) -> Tensor:
    """W (out, in) from its tiles (out / width, in, width)."""
    return tiles.transpose(1, 2).reshape(-1, tiles.shape[1])


def multiply_row(x: Tensor, tiles: Tensor) -> Tensor:
    """W x for one row x (in,): (out,)."""
    num_tiles, num_inputs, width = tiles.shape
    sums = F.embedding_bag(
        _bags(num_tiles, num_inputs),
        tiles.view(num_tiles * num_inputs, width),
        per_sample_weights=x.expand(num_tiles, num_inputs),
        mode="sum",
    )
    return sums.flatten()


def multiply_rows(x: Tensor, tiles: Tensor) -> Tensor:
    """x W^T for several rows x (rows, in): (rows, out). Every tile is multiplied at once."""
    y = torch.matmul(x, tiles)  # (tiles, rows, width)
    return y.transpose(0, 1).flatten(1)


@cache
def _bags(num_tiles: int, num_inputs: int) -> Tensor:
    """The rows of the table that each bag sums, (tiles, in): all rows of its tile."""
    rows = torch.arange(num_tiles * num_inputs, dtype=torch.int32)
    return rows.view(num_tiles, num_inputs)
