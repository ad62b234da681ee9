"""How completions are written: one table, with the names and defaults of generate.py's flags."""

from dataclasses import dataclass
from typing import Any

from minillama.errors import UserError
from minillama.generation.beam import EARLY_STOPPING, BeamOptions
from minillama.generation.sampling import Sampling


@dataclass(frozen=True)
class GenerationConfig:
    """How completions are written. Raises UserError for values that are out of range.

    temperature, top_k and top_p are None if they were not given. Then `Sampling` has the default,
    and beam search does not sample.
    """

    template: str = ""  # a name, or a text in Jinja; "": the checkpoint's own; "none": no template
    max_new_tokens: int = 0  # 0: 256, or as many as the context leaves
    greedy: bool = False  # the same as temperature 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    num_beams: int = 1  # 1: no beam search
    length_penalty: float = 1.0  # of beam search
    early_stopping: str = "false"  # of beam search: see `BeamOptions`
    prompt_lookup: int = 0  # tokens guessed in a step of greedy decoding: see `lookup`
    rope_alpha: float | None = None  # beyond the context: see `decode.scale_rope`
    stop: tuple[str, ...] = ()  # end before any of these strings
    ignore_eos: bool = False  # do not end at EOS

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise UserError(f"--max_new_tokens {self.max_new_tokens}: must be at least 0")
        if self.greedy and self.temperature:
            raise UserError(
                f"--greedy and --temperature {self.temperature} contradict each other; "
                "greedy is temperature 0; leave one of them out"
            )
        if self.num_beams < 1:
            raise UserError(f"--num_beams {self.num_beams}: must be at least 1")
        if not abs(self.length_penalty) <= 10:  # refuses nan as well
            raise UserError(f"--length_penalty {self.length_penalty}: must be from -10 to 10")
        if self.early_stopping not in EARLY_STOPPING:
            raise UserError(
                f"--early_stopping {self.early_stopping!r}: must be {', '.join(EARLY_STOPPING)}"
            )
        if "" in self.stop:
            raise UserError(
                '--stop "": an empty text would end every completion at once; leave it out'
            )
        is_greedy = self.sampling.temperature == 0 and self.repetition_penalty == 1
        if self.prompt_lookup < 0:
            raise UserError(f"--prompt_lookup {self.prompt_lookup}: must be at least 0")
        if self.prompt_lookup and not (is_greedy and self.num_beams == 1):
            raise UserError(
                "--prompt_lookup is for greedy decoding: add --greedy, and leave --num_beams and "
                "--repetition_penalty out"
            )

    @property
    def sampling(self) -> Sampling:
        """How the next token is chosen."""
        given = self._given_sampling()
        if self.greedy:
            given["temperature"] = 0.0
        return Sampling(**given, repetition_penalty=self.repetition_penalty)

    @property
    def beams(self) -> BeamOptions | None:
        """How to search with beams; None: no beam search."""
        if self.num_beams == 1:
            return None
        sample = bool(self._given_sampling()) and self.sampling.temperature > 0
        return BeamOptions(self.num_beams, self.length_penalty, self.early_stopping, sample)

    def _given_sampling(self) -> dict[str, Any]:
        values = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {name: value for name, value in values.items() if value is not None}
