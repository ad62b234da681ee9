"""A packed row: three documents end to end, their positions, and who sees whom."""

from docs.figures.drawing import BLUE, GREEN, ORANGE, Picture
from minillama.ops.packing import Documents
from minillama.ops.reference import document_mask

LENGTHS = [5, 2, 4]
COLOURS = [BLUE, ORANGE, GREEN]
CELL = 22
LEFT = 110
TOP = 16


def draw() -> Picture:
    documents = Documents(LENGTHS)
    mask = document_mask(documents).tolist()
    picture = Picture(570, 330)

    document_of = []
    for number, length in enumerate(LENGTHS):
        document_of += [number] * length
    for column, position in enumerate(documents.positions.tolist()):
        number = document_of[column]
        name = "abc"[number]
        x = LEFT + column * CELL
        picture.box(x, TOP, CELL - 2, CELL - 2, COLOURS[number], f"{name}{position}")
        picture.write(x + CELL / 2 - 1, TOP + 32, str(position), size=9)
    picture.write(LEFT - 10, TOP + 10, "one row", align="right")
    picture.write(LEFT - 10, TOP + 32, "positions", align="right")

    top = TOP + 56
    side = len(mask) * CELL
    picture.frame(LEFT - 3, top - 3, side + 4, side + 4)
    for row, seen in enumerate(mask):
        number = document_of[row]
        y = top + row * CELL
        name = f"{'abc'[number]}{row - sum(LENGTHS[:number])}"
        picture.write(LEFT - 10, y + CELL / 2 - 1, name, 8, align="right")
        for column, is_seen in enumerate(seen):
            if is_seen:
                picture.box(LEFT + column * CELL, y, CELL - 2, CELL - 2, COLOURS[number])
    picture.write(LEFT - 34, top + 121, "query", align="right")

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
        picture.write(right, y, text, align="left")
    return picture
