"""f and g of tensor parallelism, around attention and around the MLP, on two ranks."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.figures.drawing import COLOURS, INK, PURPLE, arrow, box, canvas, line, write

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


def draw() -> Figure:
    figure, axes = canvas(680, 322)
    for number, (name, parts) in enumerate(BLOCKS):
        draw_block(axes, 24 + number * ROW, name, parts)
    rows = (
        ("", "forward", "backward"),
        ("f", "the same x for each rank", "the sum of the ranks' gradients"),
        ("g", "the sum of the ranks' outputs", "the same gradient for each rank"),
    )
    for number, (name, forward, backward) in enumerate(rows):
        y = 262 + number * 20
        write(axes, 110, y, name, color=PURPLE, bold=True)
        write(axes, LEFT, y, forward, align="left", bold=number == 0)
        write(axes, LEFT + 2 * (BOX + GAP), y, backward, align="left", bold=number == 0)
    return figure


def draw_block(axes: Axes, top: float, name: str, parts: tuple[str, ...]) -> None:
    """x, f, the lanes of both ranks, g, and the sum with x."""
    middle = top + (LANE + HEIGHT) / 2
    f_at = 110.0
    g_at = LEFT + 3 * (BOX + GAP) + 14
    plus_at = g_at + 50
    write(axes, 14, middle - 20, name, align="left", bold=True)
    write(axes, 32, middle, "x")
    line(axes, [40, f_at - 14], [middle, middle])
    for letter, place in (("f", f_at), ("g", g_at)):
        box(axes, place - 13, middle - 13, 26, 26, letter, PURPLE, size=12)
    for rank in range(2):
        draw_lane(axes, rank, top + rank * LANE, middle, parts, f_at, g_at)
    arrow(axes, (g_at + 14, middle), (plus_at - 9, middle))
    write(axes, plus_at, middle, "+", size=14)
    # the residual stream goes around the block
    below = top + LANE + HEIGHT + 11
    line(axes, [58, 58, plus_at], [middle, below, below])
    arrow(axes, (plus_at, below), (plus_at, middle + 9))


def draw_lane(
    axes: Axes,
    rank: int,
    top: float,
    middle: float,
    parts: tuple[str, ...],
    f_at: float,
    g_at: float,
) -> None:
    """What one rank computes between f and g."""
    y = top + HEIGHT / 2
    arrow(axes, (f_at + 14, middle), (LEFT - 2, y), INK)
    for place, text in enumerate(parts):
        x = LEFT + place * (BOX + GAP)
        box(axes, x, top, BOX, HEIGHT, text.format(rank), COLOURS[rank], size=8)
        is_last = place == len(parts) - 1
        end = (g_at - 14, middle) if is_last else (x + BOX + GAP - 2, y)
        arrow(axes, (x + BOX + 2, y), end)
