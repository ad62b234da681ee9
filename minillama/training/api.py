"""The Python API of training: a preset with changed keys, for `minillama.train`.

minillama.train(minillama.preset("demo_lora", max_steps=100))
"""

from pathlib import Path
from typing import Any

from minillama.errors import UserError, closest
from minillama.presets import resolve
from minillama.train_config import KEYS, TrainConfig


def preset(name: str | Path, **keys: Any) -> TrainConfig:
    """The settings of a preset, a .toml file or a train_config.json, with some keys changed.

    Raises UserError for an unknown preset or key, with the closest one.
    """
    for key in keys:
        if key not in KEYS:
            raise UserError(
                f"no key {key!r}{closest(key, KEYS)}; docs/python.md says where all are"
            )
    return resolve(str(name), keys)
