"""How flags of other systems are read: tables of what each one means.

Their command lines can be pasted after ours. A flag of theirs is in one row of a table:

    renamed     another name for a flag of ours             --load DIR                 is --ckpt DIR
    allowed     may only have values that mean what         --normalization RMSNorm    is accepted
                this program does
    harmless    changes no result, and why                  --use-flash-attn
    refused     is not done here, and what is instead       --load-8bit
    numbers     a number that the checkpoint says itself    --num-layers 32            must be right
    others      needs more than a table

Any other flag is unknown, and an error. A flag without a value is `true`.
"""

from argparse import SUPPRESS
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minillama.cli import Parser
from minillama.errors import UserError


@dataclass(frozen=True)
class Allowed:
    """The values that a flag may have, and why others are an error."""

    values: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class FlagTable:
    """The flags of other systems that one script reads beside its own."""

    renamed: Mapping[str, str]  # their name -> ours, and its value where it is fixed
    allowed: Mapping[str, Allowed]
    harmless: Mapping[str, str]  # flag -> why it changes no result
    refused: Mapping[str, str]  # flag -> what to use instead
    numbers: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """All flags but the renamed ones."""
        return [*self.allowed, *self.harmless, *self.refused, *self.numbers, *self.others]

    def add_to(self, parser: Parser) -> None:
        """Let a parser accept the flags, which `--help` leaves out."""
        parser.renamed |= self.renamed
        for name in self.names:
            parser.add_argument(f"--{name}", nargs="*", help=SUPPRESS)

    def given(self, flags: Mapping[str, Any]) -> dict[str, str]:
        """The values of the flags that were given; one without a value is "true".

        Raises UserError for a flag that is refused, and for a value that is not allowed.
        """
        values = {}
        for name in self.names:
            words = flags.get(name)
            if words is not None:
                values[name] = " ".join(words) if words else "true"
        for name, value in values.items():
            if name in self.refused:
                raise UserError(f"--{name} is not supported: {self.refused[name]}")
            if name in self.allowed and value.lower() not in self.allowed[name].values:
                raise UserError(f"--{name} {value} is not supported: {self.allowed[name].reason}")
        return values


LLAMA_TOKENIZERS = Allowed(
    ("pretrainedfromhf", "llama2tokenizer", "sentencepiecetokenizer"),
    "--tokenizer FILE names LLaMA's tokenizer",
)
RMSNORM = Allowed(("rmsnorm",), "LLaMA's norm is RMSNorm")

KERNEL = "another order of the same sums; --ops chooses"
SAME_IDS = "both tokenizers of transformers have the same ids"
# flag -> why it changes no result of training, generation or evaluation
HARMLESS_EVERYWHERE = {
    "flash_attn": KERNEL,
    "use_flash_attn": KERNEL,
    "use_flash_attention_2": KERNEL,
    "use_fused_rmsnorm": KERNEL,
    "use_fused_rotary_pos_emb": KERNEL,
    "no_masked_softmax_fusion": KERNEL,
    "mlp_layer_fusion": "gate and up as one product or as two have the same elements",
    "tokenizer_not_use_fast": SAME_IDS,
    "use_fast_tokenizer": SAME_IDS,
    "low_cpu_mem_usage": "weights are read one tensor at a time",
    "trust_remote_code": "no code of a checkpoint is ever run",
}


def whole_number(name: str, text: str) -> int:
    """The value of a flag that is a whole number from 0."""
    if not text.isdecimal():
        raise UserError(f"--{name} {text}: expected a whole number")
    return int(text)


def truth(name: str, text: str) -> bool:
    """The value of a flag that is true or false."""
    if text.lower() not in ("true", "false"):
        raise UserError(f"--{name} {text}: expected True or False")
    return text.lower() == "true"
