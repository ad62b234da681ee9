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


def refuse_old_torch() -> None:
    """Raise UserError if torch is missing or too old. Does not import it."""
    lowest = ".".join(str(part) for part in LOWEST_TORCH)
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        raise UserError(
            f"torch is not installed; minillama needs {lowest} or newer (docs/install.md)"
        ) from None
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        return  # a version without numbers: a build of one's own
    if (int(numbers[1]), int(numbers[2])) < LOWEST_TORCH:
        raise UserError(
            f"torch {version}: minillama needs {lowest} or newer; install another version, or see "
            "docs/install.md for the plug-ins that go with it"
        )
