"""At every operation on files of every command: a kill, a write cut short, a full disk.

The same command afterwards ends with what an undisturbed one leaves, file by file, or it says that
the output is complete already. What existed before is still there. In the suite a few points of
each command are tried; `--all-kill-points` tries all.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minillama.data.renames import complete_dataset
from minillama.output_directory import restore
from tests.faults.commands import Outcome, run_command
from tests.faults.injector import KILLED
from tests.faults.scenarios import SCENARIOS, Scenario, content_of, hashes_of, write_world

POINTS = 5  # of each command and kind of fault, in the suite
IS_COMPLETE = r"already exists|this run is finished"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "world"
    write_world(folder)
    return folder


class Bench:
    """The folder in which a scenario is run again and again, always under the same path."""

    def __init__(self, world: Path, scenario: Scenario, place: Path) -> None:
        self.scenario = scenario
        self.folder = place / "work"
        self.report = place / "report"
        self.start = place / "start"
        shutil.copytree(world, self.start)
        self.clear()
        if scenario.prepare is not None:
            scenario.prepare(self.folder)
            shutil.rmtree(self.start)
            shutil.copytree(self.folder, self.start)
        self.before = hashes_of(self.folder)
        self.undisturbed = self.run()
        assert self.undisturbed.code == 0, self.undisturbed.stderr
        self.after = content_of(self.folder)
        self.hashes_after = hashes_of(self.folder)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.start, self.folder)

    def run(self, kind: str = "", at: int = 10**9) -> Outcome:
        return run_command(self.scenario.command, self.folder, self.report, kind, at)

    def problems(self, kind: str, at: int) -> Iterator[str]:
        """Disturb the command at one point, and yield what is wrong then."""
        self.clear()
        outcome = self.run(kind, at)
        expected_codes = (0, 2) if kind == "full" else (KILLED,)
        if outcome.code not in expected_codes or "Traceback" in outcome.stderr:
            yield f"ends with {outcome.code}: {outcome.stderr[-500:]}"
        if outcome.code == 2 and not re.search(r"^error: .*\S", outcome.stderr, re.MULTILINE):
            yield f"does not say why: {outcome.stderr[-500:]}"
        yield from self.lost()
        repeated = self.run()
        is_complete = re.search(IS_COMPLETE, repeated.stdout + repeated.stderr)
        if repeated.code != 0 and not is_complete:
            yield f"the same command ends with {repeated.code}: {repeated.stderr[-500:]}"
        yield from differences(self.after, content_of(self.folder))

    def lost(self) -> Iterator[str]:
        """Yield what existed before and is neither there nor replaced by its complete successor."""
        output = self.scenario.output
        if output:
            restore(self.folder / output)  # as readers of a directory do, and of a data set
            complete_dataset(self.folder / output)
        now = hashes_of(self.folder)
        for name, sha256 in self.before.items():
            given_up = self.scenario.given_up
            is_free = is_part(name, output) or (given_up and name.startswith(given_up))
            if not is_free and now.get(name) != sha256:
                yield f"lost or changed: {name}"
        whole = (part_of(self.before, output), part_of(self.hashes_after, output))
        if part_of(now, output) not in whole:
            names = sorted(part_of(now, output))
            yield f"{output} is neither the old one nor the new one: {names}"


def is_part(name: str, output: str) -> bool:
    """Tell whether a file belongs to an output: a file, a directory, or a data set's prefix."""
    first = name.split("/")[0]
    return bool(output) and output in (first, first.rpartition(".")[0])


def part_of(content: dict[str, Any], output: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if is_part(name, output)}


def differences(expected: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            yield f"{name} is missing in the end"
        elif name not in expected:
            yield f"{name} is left over"
        elif found[name] != expected[name]:
            yield f"{name} is another than without the fault"


def chosen(count: int, everything: bool) -> list[int]:
    """Return the points to try of `count`: all, or a few that lie evenly."""
    if everything or count <= POINTS:
        return list(range(count))
    return [round(number * (count - 1) / (POINTS - 1)) for number in range(POINTS)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_same_command_after_a_fault_ends_as_if_there_was_none(
    name: str, world: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bench = Bench(world, SCENARIOS[name], tmp_path)
    operations = bench.undisturbed.operations
    every_point = request.config.getoption("all_kill_points")
    failures = []
    for kind in ("kill", "cut", "full"):
        points = list(range(len(operations)))
        if kind == "cut":
            points = [point for point in points if operations[point].startswith("write")]
        for index in chosen(len(points), every_point):
            point = points[index]
            for problem in bench.problems(kind, point):
                failures.append(f"{kind} {point} ({operations[point]}): {problem}")
    one_of_each = {failure.split(": ")[0]: failure for failure in reversed(failures)}
    assert not failures, f"{len(failures)} failures\n" + "\n".join(one_of_each.values())
