"""f and g of tensor parallelism, around attention and around the MLP, on two ranks."""

from docs.figures.drawing import COLOURS, PURPLE, Picture

BLOCKS = (
    ("attention", ("q, k, v: rows of head {}", "attention of head {}", "o: columns of head {}")),
    ("MLP", ("gate, up: half of the rows", "silu(gate) · up", "down: half of the columns")),
)
LEFT = 150
BOX = 128
GAP = 16
LANE = 40  # between the ranks
HEIGHT = 30
ROW = 118  # between the blocks


def draw() -> Picture:
    picture = Picture(680, 322)
    for number, (name, parts) in enumerate(BLOCKS):
        draw_block(picture, 24 + number * ROW, name, parts)
    backward_at = LEFT + 2 * (BOX + GAP)
    picture.title(LEFT, 262, "forward", align="left")
    picture.title(backward_at, 262, "backward", align="left")
    rows = (
        ("f", "the same x for each rank", "the sum of the ranks' gradients"),
        ("g", "the sum of the ranks' outputs", "the same gradient for each rank"),
    )
    for number, (name, forward, backward) in enumerate(rows):
        y = 282 + number * 20
        picture.write(110, y, name, color=PURPLE)
        picture.write(LEFT, y, forward, align="left")
        picture.write(backward_at, y, backward, align="left")
    return picture


def draw_block(picture: Picture, top: float, name: str, parts: tuple[str, ...]) -> None:
    """x, f, the lanes of both ranks, g, and the sum with x."""
    middle = top + (LANE + HEIGHT) / 2
    f_at = 110.0
    g_at = LEFT + 3 * (BOX + GAP) + 14
    plus_at = g_at + 50
    picture.title(14, middle - 20, name, align="left")
    picture.write(32, middle, "x")
    picture.line((40, middle), (f_at - 14, middle))
    for letter, place in (("f", f_at), ("g", g_at)):
        picture.box(place - 13, middle - 13, 26, 26, PURPLE, letter, size=12)
    for rank in range(2):
        draw_lane(picture, rank, top + rank * LANE, middle, parts, f_at, g_at)
    picture.arrow((g_at + 14, middle), (plus_at - 9, middle))
    picture.write(plus_at, middle, "+", size=14)
    # the residual stream goes around the block
    below = top + LANE + HEIGHT + 11
    picture.line((58, middle), (58, below), (plus_at, below))
    picture.arrow((plus_at, below), (plus_at, middle + 9))


def draw_lane(
    picture: Picture,
    rank: int,
    top: float,
    middle: float,
    parts: tuple[str, ...],
    f_at: float,
    g_at: float,
) -> None:
    """What one rank computes between f and g."""
    y = top + HEIGHT / 2
    picture.arrow((f_at + 14, middle), (LEFT - 2, y))
    for place, text in enumerate(parts):
        x = LEFT + place * (BOX + GAP)
        picture.box(x, top, BOX, HEIGHT, COLOURS[rank], text.format(rank))
        is_last = place == len(parts) - 1
        end = (g_at - 14, middle) if is_last else (x + BOX + GAP - 2, y)
        picture.arrow((x + BOX + 2, y), end)
