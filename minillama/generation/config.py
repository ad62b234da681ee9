"""How completions are written: one table, with the names and defaults of generate.py's flags."""

from dataclasses import dataclass
from typing import Any

from minillama.errors import UserError
from minillama.generation.beam import BeamOptions
from minillama.generation.sampling import Sampling


@dataclass(frozen=True)
class GenerationConfig:
    """How completions are written. Raises UserError for values that are out of range.

    temperature, top_k and top_p are None where nothing was said: then `Sampling` has the default,
    and beam search does not sample.
    """

    template: str = ""  # prompt template; "": the checkpoint's own; "none": text as it is
    max_new_tokens: int = 0  # 0: 256, or as many as the context leaves
    greedy: bool = False  # the same as temperature 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    num_beams: int = 1  # 1: no beam search
    length_penalty: float = 1.0  # of beam search
    early_stopping: str = "false"  # of beam search: see `BeamOptions`
    rope_alpha: float | None = None  # beyond the context: see `decode.scale_rope`
    stop: tuple[str, ...] = ()  # end before any of these strings
    ignore_eos: bool = False  # do not end at EOS

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise UserError(f"--max_new_tokens {self.max_new_tokens}: must be at least 0")
        if self.num_beams < 1:
            raise UserError(f"--num_beams {self.num_beams}: must be at least 1")
        if not abs(self.length_penalty) <= 10:  # `not <=` refuses nan as well
            raise UserError(f"--length_penalty {self.length_penalty}: must be from -10 to 10")
        if "" in self.stop:
            raise UserError('--stop "": an empty text would end every answer at once; leave it out')
        _ = self.sampling  # checks its own values

    @property
    def sampling(self) -> Sampling:
        """How the next token is chosen."""
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }
        if self.greedy:
            given["temperature"] = 0.0
        values = {name: value for name, value in given.items() if value is not None}
        return Sampling(**values, repetition_penalty=self.repetition_penalty)

    @property
    def beams(self) -> BeamOptions | None:
        """How to search with beams; None: one completion at a time."""
        if self.num_beams == 1:
            return None
        asks_to_sample = any(
            value is not None for value in (self.temperature, self.top_k, self.top_p)
        )
        return BeamOptions(
            self.num_beams,
            self.length_penalty,
            self.early_stopping,
            sample=asks_to_sample and self.sampling.temperature > 0,
        )
