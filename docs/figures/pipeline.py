"""1F1B as a timetable: which forward or backward each stage runs at which time.

The order of each stage's work is recorded from `Stage.run_1f1b` itself, without sending anything. A
forward takes one unit of time here, a backward too. It starts as soon as its stage is free and its
input is there.
"""

import torch
from torch import Tensor

from docs.figures.drawing import BLUE, ORANGE, Picture
from minillama.comm import Mesh
from minillama.parallel.pipeline import Stage

STAGES = 4
MICRO_BATCHES = 6
CELL = 28
LEFT = 70
TOP = 30

Work = tuple[str, int]  # "F" or "B", and the number of a micro-batch


class RecordedStage(Stage):
    """A stage that sends and receives nothing."""

    def exchange_with_next(self, activations: Tensor | None, length: int | None) -> None:
        return None

    def exchange_with_previous(self, gradient: Tensor | None, length: int | None) -> None:
        return None


def work_of(stage: int) -> list[Work]:
    """What a stage does, in order."""
    work: list[Work] = []

    def forward(number: int) -> Tensor:
        work.append(("F", number))
        return torch.zeros(())

    def backward(number: int, loss: Tensor) -> None:
        work.append(("B", number))

    mesh = Mesh(rank=stage, size=STAGES)
    recorded = RecordedStage(mesh, width=1, dtype=torch.float32, sends_random_state=False)
    recorded.run_1f1b([1] * MICRO_BATCHES, forward, backward)
    return work


def timetable() -> dict[tuple[int, Work], int]:
    """(stage, work) -> when it starts."""
    waiting = {stage: work_of(stage) for stage in range(STAGES)}
    starts: dict[tuple[int, Work], int] = {}
    time = 0
    while any(waiting.values()):
        ready = []
        for stage, work in waiting.items():
            if work and is_ready(stage, work[0], starts, time):
                ready.append(stage)
        for stage in ready:
            starts[stage, waiting[stage].pop(0)] = time
        time += 1
    return starts


def is_ready(stage: int, work: Work, starts: dict[tuple[int, Work], int], time: int) -> bool:
    """Whether the input of a piece of work is there: what it needs has ended."""
    kind, number = work
    needed = (stage - 1, work) if kind == "F" else (stage + 1, work)
    if kind == "F" and stage == 0:
        return True
    if kind == "B" and stage == STAGES - 1:
        needed = (stage, ("F", number))
    return starts.get(needed, time) < time


def draw() -> Picture:
    picture = Picture(650, 218)
    starts = timetable()
    for (stage, (kind, number)), time in starts.items():
        x = LEFT + time * CELL
        y = TOP + stage * (CELL + 4)
        color = BLUE if kind == "F" else ORANGE
        picture.box(x, y, CELL - 2, CELL, color, f"{kind}{number}")
    end = max(starts.values()) + 1
    for stage in range(STAGES):
        picture.write(
            LEFT - 10, TOP + stage * (CELL + 4) + CELL / 2, f"stage {stage}", align="right"
        )
    picture.arrow((LEFT, 14), (LEFT + end * CELL, 14))
    picture.write(LEFT - 10, 14, "time", align="right")
    idle = end - 2 * MICRO_BATCHES
    notes = (
        "F2: forward of micro-batch 2.  B2: its backward.",
        f"Stage s keeps the activations of at most {STAGES} - s micro-batches.",
        f"Each stage is idle for {idle} of {end} units: {STAGES - 1} forwards and {STAGES - 1} "
        "backwards, however many micro-batches there are.",
    )
    for row, text in enumerate(notes):
        picture.write(LEFT, 168 + row * 18, text, size=9, align="left")
    return picture
