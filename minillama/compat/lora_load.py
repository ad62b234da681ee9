"""AscendSpeed's --lora-load DIR: a LoRA run goes on from an adapter.

What DIR holds decides what is taken from it:

    a run of ours, or its checkpoints/step-N    factors, optimizer and step     --resume
    a PEFT directory, or a run's final/         factors; the run begins anew    --adapter
    AscendSpeed's own checkpoint                an error, with the command that converts it
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillama.errors import UserError
from minillama.files import read_json

STATE = "state.json"  # of a checkpoint that a run can be continued from
TRACKER = "latest_checkpointed_iteration.txt"


def continued_adapter(directory: Path, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return what --lora-load means, as values of our keys.

    flags: `ckpt` is named in the command of an error; `out_dir` is the run's own directory.
    Raises UserError if the directory holds no adapter.
    """
    if (directory / STATE).is_file():
        return {"resume": str(directory), "lora": True}
    out_dir = flags.get("out_dir")
    if out_dir and Path(out_dir).resolve() == directory.resolve():
        return {"lora": True}  # --resume auto, the default, continues it
    checkpoints = sorted(directory.glob(f"checkpoints/step-*/{STATE}"), key=_step_of)
    if checkpoints:
        return {"resume": str(checkpoints[-1].parent), "lora": True}
    for candidate in (directory, directory / "final"):
        if (candidate / "adapter_config.json").is_file():
            return {"adapter": str(candidate)}
    raise UserError(f"--lora_load {directory}: {_what_is_there(directory, flags)}")


def _step_of(state: Path) -> int:
    return int(read_json(state)["step"])


def _what_is_there(directory: Path, flags: Mapping[str, Any]) -> str:
    if not directory.is_dir():
        return "no such directory"
    has_ranks = any(directory.glob("mp_rank_*")) or any(directory.glob("*/mp_rank_*"))
    if not has_ranks and not (directory / TRACKER).is_file():
        return "holds no adapter: neither a run of ours, nor adapter_config.json"
    output = f"{directory.name}-peft"
    words = ["python", "convert.py", "from-megatron", "--input", str(directory)]
    words += ["--config", flags.get("ckpt") or "LLAMA_DIR", "--output", output]
    if "lora_alpha" in flags:
        words += ["--lora_alpha", f"{flags['lora_alpha']:g}"]
    command = shlex.join(words)
    return f"Megatron's; make a PEFT directory of it: {command}   then: --lora_load {output}"
