"""minillama: the whole LLaMA workflow, from scratch, in plain PyTorch.

    import minillama
    model = minillama.load("runs/demo")
    print(model.generate("Which number is larger, 31 or 62?", greedy=True))

Read the files in the order of the README; docs/python.md has every function. Importing the package
imports none of its parts, and not torch: a name of the Python API is imported at its first use.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if sys.version_info < (3, 11):  # noqa: UP036  # an older Python cannot read the other modules
    python = ".".join(str(part) for part in sys.version_info[:2])
    sys.stderr.write(f"error: Python 3.11 or newer is needed; this is {python}\n")
    sys.exit(2)

if TYPE_CHECKING:  # what a type checker sees in place of `__getattr__`
    from minillama.conversion.api import apply_delta as apply_delta
    from minillama.conversion.api import from_megatron as from_megatron
    from minillama.conversion.api import make_delta as make_delta
    from minillama.conversion.api import megatron as megatron
    from minillama.conversion.api import merge_lora as merge_lora
    from minillama.conversion.api import merge_tokenizers as merge_tokenizers
    from minillama.conversion.api import meta as meta
    from minillama.conversion.api import reshard as reshard
    from minillama.conversion.api import sha256 as sha256
    from minillama.conversion.api import tokenize_data as tokenize_data
    from minillama.errors import UserError as UserError
    from minillama.evaluation.api import evaluate as evaluate
    from minillama.generation.api import LoadedModel as LoadedModel
    from minillama.generation.api import load as load
    from minillama.train_config import TrainConfig as TrainConfig
    from minillama.training.api import preset as preset
    from minillama.training.trainer import train as train

__version__ = "0.1.0"

PYTHON_API = {  # name -> the module that has it
    "LoadedModel": "minillama.generation.api",
    "TrainConfig": "minillama.train_config",
    "UserError": "minillama.errors",
    "apply_delta": "minillama.conversion.api",
    "evaluate": "minillama.evaluation.api",
    "from_megatron": "minillama.conversion.api",
    "load": "minillama.generation.api",
    "make_delta": "minillama.conversion.api",
    "megatron": "minillama.conversion.api",
    "merge_lora": "minillama.conversion.api",
    "merge_tokenizers": "minillama.conversion.api",
    "meta": "minillama.conversion.api",
    "preset": "minillama.training.api",
    "reshard": "minillama.conversion.api",
    "sha256": "minillama.conversion.api",
    "tokenize_data": "minillama.conversion.api",
    "train": "minillama.training.trainer",
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
