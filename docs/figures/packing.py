"""A packed row: three documents end to end, their positions, and who sees whom."""

from matplotlib.figure import Figure

from docs.figures.drawing import BLUE, GREEN, INK, ORANGE, box, canvas, write
from minillama.ops.packing import Documents
from minillama.ops.reference import document_mask

LENGTHS = [5, 2, 4]
COLOURS = [BLUE, ORANGE, GREEN]
CELL = 22
LEFT = 110
TOP = 16


def draw() -> Figure:
    documents = Documents(LENGTHS)
    mask = document_mask(documents).tolist()
    figure, axes = canvas(570, 330)

    document_of = []
    for number, length in enumerate(LENGTHS):
        document_of += [number] * length
    for column, position in enumerate(documents.positions.tolist()):
        number = document_of[column]
        name = "abc"[number]
        x = LEFT + column * CELL
        box(axes, x, TOP, CELL - 2, CELL - 2, f"{name}{position}", COLOURS[number], size=8)
        write(axes, x + CELL / 2 - 1, TOP + 32, str(position), size=9)
    write(axes, LEFT - 10, TOP + 10, "one row", align="right")
    write(axes, LEFT - 10, TOP + 32, "positions", align="right")

    top = TOP + 56
    side = len(mask) * CELL
    box(axes, LEFT - 3, top - 3, side + 4, side + 4, color=INK, filled=False)
    for row, seen in enumerate(mask):
        number = document_of[row]
        y = top + row * CELL
        name = f"{'abc'[number]}{row - sum(LENGTHS[:number])}"
        write(axes, LEFT - 10, y + CELL / 2 - 1, name, 8, align="right")
        for column, is_seen in enumerate(seen):
            if is_seen:
                box(axes, LEFT + column * CELL, y, CELL - 2, CELL - 2, color=COLOURS[number])
    write(axes, LEFT - 34, top + 121, "query", align="right")

    right = LEFT + 11 * CELL + 20
    notes = (
        (top + 44, "A filled square: the query of this row"),
        (top + 60, "sees the key of this column."),
        (top + 98, "No document sees another,"),
        (top + 114, "and none sees its own future."),
        (top + 152, "So the loss of the row is the sum"),
        (top + 168, "of the losses of its documents."),
    )
    for y, text in notes:
        write(axes, right, y, text, align="left")
    return figure
