"""Flags of other systems for eval.py.

AscendSpeed's evaluation is given --task-data-path. Its scores are those of the protocol `ascend`.
Chinese-LLaMA-Alpaca has a script for C-Eval, which reads the folder `data`, and a script for CMMLU,
which is given --input_dir. They have no flag for the task.
"""

from collections.abc import Mapping
from typing import Any

from minillama.compat import model_flags
from minillama.compat.flag_tables import Allowed, FlagTable, truth, whole_number
from minillama.compat.model_flags import Translation, numbers_of
from minillama.errors import UserError

# The tasks that AscendSpeed and this program have in common; each has a protocol `ascend`.
ASCENDSPEED_TASKS = ("boolq", "mmlu", "ceval")
ONE_TOKEN_TASKS = ("mmlu", "ceval")  # that protocol of theirs writes one token
SCORED = "an answer is the likeliest choice, and no text is written"
# The flags that only Chinese-LLaMA-Alpaca's scripts have.
CHINESE_ALPACA = (
    "few_shot",
    "with_prompt",
    "cot",
    "constrained_decoding",
    "n_times",
    "do_test",
    "do_save_csv",
    "input_dir",
)

TABLE = FlagTable(
    renamed=model_flags.RENAMED
    | {
        "load": "ckpt",
        "model_path": "ckpt",
        "data_path": "data",
        "output_dir": "out",
        "seq_length": "max_length",
    },
    allowed=model_flags.ALLOWED
    | {
        "cot": Allowed(("false",), f"{SCORED}; use --cot False"),
        "constrained_decoding": Allowed(("true",), f"{SCORED}; use --constrained_decoding True"),
        "n_times": Allowed(("1",), "each time would give the same answers; use --n_times 1"),
        "do_test": Allowed(
            ("false",), "the answers of that split are not published; val/ has some"
        ),
    },
    harmless=model_flags.HARMLESS
    | {
        "temperature": "all choices' scores are divided by it",
        "verbose": "predictions.jsonl of --out has every answer",
    },
    refused=model_flags.REFUSED,
    numbers=(*model_flags.SHAPE, "max_position_embeddings"),
    others=(
        "task_data_path",
        "input_dir",
        "few_shot",
        "ntrain",
        "with_prompt",
        "do_save_csv",
        "max_new_tokens",
    ),
)


def translate(flags: Mapping[str, Any]) -> Translation:
    """What the given flags of other systems mean; `flags` are all that were parsed.

    Raises UserError for a flag that is refused, or contradicts another.
    """
    given = TABLE.given(flags)
    ours: dict[str, Any] = {}
    if any(name in given for name in CHINESE_ALPACA):
        ours |= _chinese_alpaca(given, flags)
    for name in ("task_data_path", "input_dir"):
        if name in given and flags["data"]:
            raise UserError(f"--{name} is another name of --data; leave one of them out")
        if name in given:
            ours["data"] = given[name]
    task = ours.get("task", flags["task"])
    protocol = ours.get("protocol", flags["protocol"])
    if "task_data_path" in given and not protocol and task in ASCENDSPEED_TASKS:
        protocol = "ascend"
        ours["protocol"] = protocol
    if "task_data_path" in given:
        ours["seed"] = 0  # no score depends on it; our own --seed is refused as meaningless
    if "ntrain" in given and "n_shots" not in ours:
        ours["n_shots"] = whole_number("ntrain", given["ntrain"])
    if "max_new_tokens" in given:
        check_new_tokens(given["max_new_tokens"], task, protocol)
    return Translation(ours, numbers_of(given))


def _chinese_alpaca(given: Mapping[str, str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The task, shots and protocol of Chinese-LLaMA-Alpaca's flags."""
    ours: dict[str, Any] = {}
    if not flags["task"]:
        ours["task"] = "cmmlu" if "input_dir" in given else "ceval"
        if not flags["data"] and "input_dir" not in given:
            ours["data"] = "data"
    if "few_shot" in given:
        is_wanted = truth("few_shot", given["few_shot"])
        count = whole_number("ntrain", given.get("ntrain", "5"))
        ours["n_shots"] = count if is_wanted else 0
    if "with_prompt" in given:
        is_wanted = truth("with_prompt", given["with_prompt"])
        ours["protocol"] = "chinese_alpaca" if is_wanted else "chinese_alpaca_plain"
    if "do_save_csv" in given:
        ours["csv"] = truth("do_save_csv", given["do_save_csv"])
    return ours


def check_new_tokens(text: str, task: str, protocol: str) -> None:
    """Raise UserError for --max-new-tokens if it would change a score.

    Under most protocols nothing is written: the choices are scored.
    """
    count = whole_number("max_new_tokens", text)
    if task in ONE_TOKEN_TASKS and protocol == "ascend" and count != 1:
        raise UserError(
            f"--max_new_tokens {count}: {task} is answered with one token; use --max_new_tokens 1"
        )
