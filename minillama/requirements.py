"""The lowest torch that minillama runs on.

The tests were run on this version and on the one of constraints.txt (docs/install.md). An older one
would fail later, at the first function that it lacks. So the scripts compare versions before they
import torch. The lowest Python is checked in `__init__.py`, because an older Python cannot read the
other modules. A test compares both with pyproject.toml.
"""

import re
from importlib import metadata

from minillama.errors import UserError

LOWEST_TORCH = (2, 7)
# Ranks on the CPU talk through gloo. On torch 2.7 they can hang when they end: a process waits for
# gloo's threads, and these wait for Python's lock, which the process holds. 2.10 was run many times
# without that. What is between the two is not known.
LOWEST_TORCH_WITH_GLOO = (2, 10)


def refuse_old_torch() -> None:
    """Raise UserError if torch is missing or too old. Does not import it."""
    lowest = ".".join(str(part) for part in LOWEST_TORCH)
    try:
        is_too_old = torch_version() < LOWEST_TORCH
    except metadata.PackageNotFoundError:
        raise UserError(
            f"torch is not installed; minillama needs {lowest} or newer (docs/install.md)"
        ) from None
    if is_too_old:
        raise UserError(
            f"torch {metadata.version('torch')}: minillama needs {lowest} or newer; install another"
            " version, or see docs/install.md for the plug-ins that go with it"
        )


def torch_version() -> tuple[int, int]:
    """Return the first two numbers of torch's version; those of a build without any are huge.

    Raises PackageNotFoundError if torch is not installed.
    """
    numbers = re.match(r"(\d+)\.(\d+)", metadata.version("torch"))
    if numbers is None:
        return 9999, 0  # whoever builds torch without a version knows that it is new
    return int(numbers[1]), int(numbers[2])


def refuse_gloo_that_hangs() -> None:
    """Raise UserError if ranks on the CPU can hang with this torch when they end."""
    if torch_version() < LOWEST_TORCH_WITH_GLOO:
        lowest = ".".join(str(part) for part in LOWEST_TORCH_WITH_GLOO)
        raise UserError(
            f"torch {metadata.version('torch')} can hang when several ranks on the CPU end; "
            f"use torch {lowest} or newer, or one rank"
        )
