"""The key/value cache: rows of three prompts, one step, and a row that is dropped."""

from docs.figures.drawing import BLUE, GREEN, ORANGE, Picture

CAPACITY = 7
CELL = 22
PANEL = 220  # width of one picture
COLOURS = {"a": BLUE, "b": ORANGE, "c": GREEN}


def draw() -> Picture:
    picture = Picture(650, 186)
    draw_rows(picture, 0, "1. the prompts are read", ["aaaa", "bb", "ccc"], new="")
    draw_rows(picture, 1, "2. a step: one token a row", ["aaaaa", "bbb", "cccc"], new="abc")
    draw_rows(picture, 2, "3. b has ended: c takes its row", ["aaaaa", "cccc"], new="")
    for panel in (1, 2):
        x = panel * PANEL - 22
        picture.arrow((x - 10, 84), (x + 14, 84))
    notes = (
        (0, "all tokens at once,", "packed without padding"),
        (1, "a query sees its row;", "new keys and values: outlined"),
        (2, "a completion that ended", "costs nothing more"),
    )
    for panel, first, second in notes:
        middle = 10 + panel * PANEL + CAPACITY * CELL / 2
        picture.write(middle, 150, first, size=9)
        picture.write(middle, 166, second, size=9)
    return picture


def draw_rows(picture: Picture, panel: int, title: str, rows: list[str], new: str) -> None:
    """The rows of the cache. The last token of the rows in `new` is new: only its edge is drawn."""
    left = 10 + panel * PANEL
    picture.title(left + CAPACITY * CELL / 2, 16, title)
    for number, tokens in enumerate(rows):
        y = 42 + number * (CELL + 10)
        picture.frame(left - 2, y - 2, CAPACITY * CELL + 2, CELL + 2)
        for position, name in enumerate(tokens):
            is_new = name in new and position == len(tokens) - 1
            x = left + position * CELL
            text = f"{name}{position}"
            color = COLOURS[name]
            if is_new:
                picture.frame(x, y, CELL - 2, CELL - 2, color)
                picture.write(x + CELL / 2 - 1, y + CELL / 2 - 1, text, 8, color)
            else:
                picture.box(x, y, CELL - 2, CELL - 2, color, text)
