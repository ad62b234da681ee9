"""Four decoding modes side by side: greedy, sampling, beam search, beam search with sampling.

For each prompt and each mode, a heading, the prompt, its completion and the seconds are printed, in
the layout of AscendSpeed's inference:

    =============== Greedy Search ================

    You:
    how are you?

    Answer:
    I am fine.
    ==============================================

    Elapsed: 0.48s
"""

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from minillama.errors import UserError, closest

if TYPE_CHECKING:  # torch is imported when the flags and prompts are known to be right
    from minillama.generation.config import GenerationConfig
    from minillama.generation.engine import Engine
    from minillama.generation.prompts import Prompt

HEADINGS = {
    "greedy": "=============== Greedy Search ================",
    "sample": "================ Do Sample =================",
    "beam": "=============== Beam Search =================",
    "beam_sample": "======== Beam Search with sampling ==========",
}
NUM_BEAMS = 2  # without --num_beams


def parse_modes(text: str) -> tuple[str, ...]:
    """The modes of --mode. Raises UserError for an unknown name."""
    if text == "all":
        return tuple(HEADINGS)
    names = tuple(text.split(","))
    for name in names:
        if name not in HEADINGS:
            hint = closest(name, HEADINGS)
            raise UserError(f"--mode: no mode {name!r}{hint}; modes: all, {', '.join(HEADINGS)}")
    return names


def config_of_mode(config: "GenerationConfig", mode: str) -> "GenerationConfig":
    """The settings of a mode; what it leaves open is as in `config`."""
    num_beams = 1
    if mode in ("beam", "beam_sample"):
        num_beams = max(config.num_beams, NUM_BEAMS)
    if mode in ("greedy", "beam"):
        is_greedy = mode == "greedy"
        return replace(
            config,
            greedy=is_greedy,
            temperature=None,
            top_k=None,
            top_p=None,
            num_beams=num_beams,
        )
    temperature = config.sampling.temperature  # beams sample if a temperature is given
    return replace(config, temperature=temperature, num_beams=num_beams)


def print_modes(
    engine: "Engine",
    prompts: "list[Prompt]",
    prompt_ids: list[list[int]],
    modes: tuple[str, ...],
    seed: int | None,
) -> None:
    """Complete each prompt, given as the user wrote it and as token ids, in each mode."""
    for prompt, ids in zip(prompts, prompt_ids, strict=True):
        text = prompt if isinstance(prompt, str) else engine.tokenizer.decode(ids)
        for mode in modes:
            print_mode(engine, text, ids, mode, seed)


def print_mode(
    engine: "Engine", prompt: str, prompt_ids: list[int], mode: str, seed: int | None
) -> None:
    """Complete a prompt in one mode."""
    heading = HEADINGS[mode]
    mode_engine = replace(engine, config=config_of_mode(engine.config, mode))
    start = time.perf_counter()
    completion = mode_engine.new_completion(prompt_ids)
    for _ in mode_engine.stream([completion], seed):
        pass
    seconds = time.perf_counter() - start
    print(f"\n{heading}\n\nYou:\n{prompt}\n\nAnswer:\n{completion.text}\n{'=' * len(heading)}")
    print(f"\nElapsed: {seconds:.2f}s", flush=True)
