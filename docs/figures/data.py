"""The way of the data: from a record to a changed weight, and from there to an answer."""

from docs.figures.drawing import BLUE, GREEN, ORANGE, PURPLE, Picture

LEFT = 24
WIDTH = 104
HEIGHT = 34
GAP = 20
STEP = WIDTH + GAP
ROW_HEIGHT = 104
# name, what it is, the file; a row is read from left to right
ROWS = (
    (
        BLUE,
        (
            ("records", "JSON, Parquet, text", "data/records.py"),
            ("conversations", "or plain texts", "data/formats.py"),
            ("pieces", "trained on, or not", "chat.py"),
            ("ids and mask", "side by side", "data/encode.py"),
            ("packed rows", "order from the seed", "data/batches.py"),
        ),
    ),
    (
        ORANGE,
        (
            ("model", "hidden states", "model.py"),
            ("loss", "mean over all targets", "ops/reference.py"),
            ("gradients", "summed over ranks", "parallel/reducer.py"),
            ("AdamW", "clip, step, gather", "parallel/zero.py"),
            ("checkpoint", "Hugging Face's layout", "checkpoint/"),
        ),
    ),
    (
        GREEN,
        (
            ("generate.py", "complete, chat", "generation/"),
            ("eval.py", "benchmarks", "evaluation/"),
            ("convert.py", "other layouts", "conversion/"),
        ),
    ),
)


def draw() -> Picture:
    picture = Picture(656, 300)
    for number, (color, stations) in enumerate(ROWS):
        top = 8 + number * ROW_HEIGHT
        left = LEFT
        if number == len(ROWS) - 1:
            left += STEP  # below the middle
        for place, (name, meaning, file) in enumerate(stations):
            x = left + place * STEP
            picture.box(x, top, WIDTH, HEIGHT, color, name, size=10)
            picture.write(x + WIDTH / 2, top + HEIGHT + 13, meaning, size=8)
            picture.write(x + WIDTH / 2, top + HEIGHT + 26, file, size=8, color=PURPLE)
            is_last_row = number == len(ROWS) - 1
            if not is_last_row and place < len(stations) - 1:
                middle = top + HEIGHT / 2
                picture.arrow((x + WIDTH + 2, middle), (x + STEP - 2, middle))
        if number > 0:
            connect(picture, top, left)
    return picture


def connect(picture: Picture, top: float, left: float) -> None:
    """A line from the end of the row above to the first box of the row at `top`."""
    above = top - ROW_HEIGHT + HEIGHT / 2
    between = top - 16
    middle = top + HEIGHT / 2
    right = LEFT + 5 * STEP - GAP
    corners = ((right + 14, above), (right + 14, between), (left - 16, between))
    picture.line((right, above), *corners, (left - 16, middle))
    picture.arrow((left - 16, middle), (left - 2, middle))
