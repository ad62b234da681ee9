"""Flags of other systems for generate.py, and what starts when nothing else is asked for.

FastChat's cli, given --model-path, holds a conversation; an empty line ends it. AscendSpeed's
inference, given --load, answers "how are you?" in four decoding modes, then holds a conversation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minillama.compat import model_flags
from minillama.compat.flag_tables import Allowed, FlagTable, truth
from minillama.compat.model_flags import Translation, numbers_of
from minillama.errors import UserError

REQUESTS = ("prompt", "prompt_ids", "prompt_file", "chat", "web", "mode")
ASCENDSPEED_PROMPT = "how are you?"
# The numbers of AscendSpeed's --task; the fifth prints probabilities.
ASCENDSPEED_TASKS = {"1": "greedy", "2": "sample", "3": "beam", "4": "beam_sample", "6": "chat"}

NO_DRAFT = "no draft model is used; the text has the same distribution without; leave it out"
NO_GUIDANCE = "there is no classifier-free guidance; leave it out"

TABLE = FlagTable(
    renamed=model_flags.RENAMED
    | {
        "base_model": "ckpt",
        "conv_template": "template",
        "with_prompt": "template=chinese_alpaca_2",
        "interactive": "chat",
        "data_file": "prompt_file",
        "predictions_file": "output",
        "system_prompt": "system",
        "alpha": "rope_alpha",
        "num_gpus": "devices",
    },
    allowed=model_flags.ALLOWED
    | {
        "style": Allowed(("simple",), "the terminal shows plain text; use --style simple"),
        "share": Allowed(
            ("false",), "the page is served by this machine; --host ADDRESS lets others in"
        ),
    },
    harmless=model_flags.HARMLESS,
    refused=model_flags.REFUSED
    | {
        "max_gpu_memory": "memory is not limited by a flag; --max_new_tokens limits the cache",
        "max_memory": "the oldest turns are left out when the model's context is full",
        "max_length": "--max_new_tokens N limits the completion",
        "negative_prompt": NO_GUIDANCE,
        "guidance_scale": NO_GUIDANCE,
        "speculative_sampling": NO_DRAFT,
        "draft_k": NO_DRAFT,
        "draft_base_model": NO_DRAFT,
        "draft_model_load_in_8bit": NO_DRAFT,
        "draft_model_load_in_4bit": NO_DRAFT,
        "use_ntk": "--rope_alpha auto, or --alpha A, scales the rotary base",
        "post_host": "the page and the model are one process; --host is the page's",
        "post_port": "the page and the model are one process; --port is the page's",
    },
    numbers=(*model_flags.SHAPE, *model_flags.CONTEXT),
    others=("model_path", "load", "task", "do_sample", "gpus"),
)


@dataclass(frozen=True)
class GenerationTranslation(Translation):
    """What their flags for generate.py mean."""

    fallback_template: str = ""  # of a checkpoint that names none
    ends_at_empty_line: bool = False  # of the conversation


def translate(flags: Mapping[str, Any]) -> GenerationTranslation:
    """What the given flags of other systems mean; `flags` are all that were parsed.

    Raises UserError for a flag that is refused, or contradicts another.
    """
    given = TABLE.given(flags)
    has_request = any(flags[name] for name in REQUESTS)
    ours: dict[str, Any] = {}
    for name in ("model_path", "load"):
        if name in given and (flags["ckpt"] or "ckpt" in ours):
            raise UserError(f"--{name} is another name of --ckpt; leave one of them out")
        if name in given:
            ours["ckpt"] = given[name]
    if "task" in given:
        if has_request:
            raise UserError("--task says what to write, and so does another flag; use --mode")
        ours |= _requests_of_tasks(given["task"])
    elif "load" in given and not has_request:
        ours |= _requests_of_tasks("1 2 3 4 6")
    is_fastchat = "model_path" in given
    if is_fastchat and not has_request and "task" not in given:
        ours["chat"] = True
    if "gpus" in given:
        ours["devices"] = _devices(given["gpus"], flags["devices"])
    if "do_sample" in given:
        ours |= _sampling(truth("do_sample", given["do_sample"]), flags)
    return GenerationTranslation(
        ours,
        numbers_of(given),
        fallback_template="vicuna_v1.1" if is_fastchat else "",
        ends_at_empty_line=is_fastchat,
    )


def _devices(gpus: str, devices: str) -> str:
    """What --gpus 0,1 means as --devices. FastChat's --num-gpus takes the first of them."""
    numbers = [number.strip() for number in gpus.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise UserError(f"--gpus {gpus}: expected numbers of devices, such as 0,1")
    if devices and not devices.isdecimal():
        raise UserError(f"--gpus {gpus} and --devices {devices}: leave one of them out")
    count = int(devices or len(numbers))
    if count > len(numbers):
        raise UserError(f"--num-gpus {count} is more than --gpus {gpus} names; name {count}")
    return ",".join(f"auto:{number}" for number in numbers[:count])


def _requests_of_tasks(text: str) -> dict[str, Any]:
    """What AscendSpeed's tasks ask for, as our flags; it has a prompt of its own."""
    names = []
    for number in text.replace(",", " ").split():
        if number not in ASCENDSPEED_TASKS:
            known = ", ".join(f"{key} {name}" for key, name in ASCENDSPEED_TASKS.items())
            raise UserError(f"--task {number} is not supported: {known}")
        names.append(ASCENDSPEED_TASKS[number])
    modes = [name for name in names if name != "chat"]
    requests: dict[str, Any] = {"chat": "chat" in names}
    if modes:
        requests["mode"] = tuple(modes)
        requests["prompt"] = [ASCENDSPEED_PROMPT]
    return requests


def _sampling(is_wanted: bool, flags: Mapping[str, Any]) -> dict[str, Any]:
    """What --do_sample means beside our own flags."""
    if not is_wanted:
        return {"greedy": True} if flags["num_beams"] == 1 else {}
    if flags["greedy"]:
        raise UserError("--do_sample and --greedy contradict each other; leave one of them out")
    given = [flags[name] for name in ("temperature", "top_k", "top_p")]
    if flags["num_beams"] > 1 and given == [None, None, None]:
        raise UserError("--do_sample with --num_beams: add what to sample with: --temperature 1.0")
    return {}
