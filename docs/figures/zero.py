"""ZeRO's flat vector: parameters end to end, and what each of two ranks keeps at stages 0, 1, 2."""

from docs.figures.drawing import COLOURS, INK, Picture
from minillama.parallel.flat_layout import lay_out

# A toy model: matrices first, then what is never decayed. Names and elements.
PARAMETERS = (
    ("q_proj", 10),
    ("k_proj", 6),
    ("v_proj", 6),
    ("o_proj", 10),
    ("norm", 3),
    ("bias", 2),
)
RANKS = 2
PADDED = 40  # elements, so that every rank has a slice of the same size
LEFT = 120
WIDTH = 510  # of the vector
HEIGHT = 24
# What is kept for each element, its bytes in a 16-bit model, and the first stage that shards it.
KEPT = (("weights", 2, 3), ("gradients", 2, 2), ("master, m, v", 12, 1))
BAR = 150  # width of a small vector
BAR_HEIGHT = 11
BAR_STEP = 180


def draw() -> Picture:
    picture = Picture(650, 284)
    draw_vector(picture, top=8)
    for stage in range(3):
        draw_stage(picture, stage, left=LEFT + stage * BAR_STEP, top=96)
    for row, (kind, _, _) in enumerate(KEPT):
        picture.write(LEFT - 12, 136 + row * 40, kind, align="right")
    picture.write(LEFT - 12, 258, "bytes a parameter", align="right")
    return picture


def draw_vector(picture: Picture, top: float) -> None:
    """The parameters in the vector, and the owner of each slice."""
    scale = WIDTH / PADDED
    ranges = lay_out([(size,) for _, size in PARAMETERS]).ranges
    picture.write(LEFT - 12, top + HEIGHT / 2, "flat vector", align="right")
    for (name, size), place in zip(PARAMETERS, ranges, strict=True):
        x = LEFT + place.start * scale
        picture.box(x, top, size * scale - 2, HEIGHT, INK, name)
    end = ranges[-1].stop
    x = LEFT + end * scale
    width = (PADDED - end) * scale - 2
    picture.frame(x, top, width, HEIGHT)
    picture.write(x + width / 2, top + HEIGHT / 2, "pad", size=8)
    picture.write(LEFT - 12, top + 32 + HEIGHT / 2, "owner", align="right")
    for rank in range(RANKS):
        x = LEFT + rank * WIDTH / RANKS
        picture.box(x, top + 32, WIDTH / RANKS - 2, HEIGHT, COLOURS[rank], f"rank {rank}", size=10)


def draw_stage(picture: Picture, stage: int, left: float, top: float) -> None:
    """What both ranks keep: filled in their colour."""
    picture.title(left + BAR / 2, top, f"stage {stage}")
    num_bytes = 0.0
    for row, (_, bytes_each, first_sharded) in enumerate(KEPT):
        is_sharded = stage >= first_sharded
        num_bytes += bytes_each / RANKS if is_sharded else bytes_each
        for rank in range(RANKS):
            y = top + 28 + row * 40 + rank * (BAR_HEIGHT + 3)
            picture.frame(left, y, BAR, BAR_HEIGHT, COLOURS[rank])
            start = BAR * rank / RANKS if is_sharded else 0
            width = BAR / RANKS if is_sharded else BAR
            picture.box(left + start, y, width, BAR_HEIGHT, COLOURS[rank])
    picture.title(left + BAR / 2, 258, f"{num_bytes:g}")
