"""minillama: the whole LLaMA workflow, from scratch, in plain PyTorch.

    import minillama
    model = minillama.load("runs/demo")
    print(model.generate("Which number is larger, 31 or 62?", greedy=True))

Read the files in the order of the README; docs/python.md has every function. Importing the package
imports none of its parts, and not torch: a name of the Python API is imported at its first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what a type checker sees in place of `__getattr__`
    from minillama.errors import UserError as UserError
    from minillama.generation.api import LoadedModel as LoadedModel
    from minillama.generation.api import load as load
    from minillama.train_config import TrainConfig as TrainConfig

__version__ = "0.1.0"

PYTHON_API = {  # name -> the module that has it
    "LoadedModel": "minillama.generation.api",
    "TrainConfig": "minillama.train_config",
    "UserError": "minillama.errors",
    "load": "minillama.generation.api",
}


def __getattr__(name: str) -> Any:
    """Import a name of the Python API when it is first used (PEP 562)."""
    if name not in PYTHON_API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(PYTHON_API[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *PYTHON_API])
