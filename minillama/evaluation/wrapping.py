"""A question inside a prompt template: `eval.py --template`.

A protocol's prompt is a plain text. A chat model was tuned on messages, so the prompt can be given
as the message of a user, and a choice as the answer:

    plain       … Answer:                             | A
    llama2      [INST] … Answer: [/INST]              | A
                context                               continuation

The tokens of a choice are those that the template makes of it as an answer, without what ends it.
"""

from minillama.chat import Conversation, Turn, name_of
from minillama.checkpoint.template_files import resolve_template
from minillama.data.encode import encode_document
from minillama.errors import UserError
from minillama.evaluation.batching import Query
from minillama.evaluation.protocols import Protocol
from minillama.tokenizer import Tokenizer


class Wrapping:
    """A template for the prompts of a protocol, in the vocabulary of a model."""

    def __init__(self, name: str, protocol: Protocol, tokenizer: Tokenizer) -> None:
        self.template = resolve_template(name)
        self.tokenizer = tokenizer
        if protocol.around != "{}":
            raise UserError(
                f"--template {name}: this protocol has a prompt format of its own "
                f"({protocol.around[:30]!r}); leave --template out, or choose another --protocol"
            )

    @property
    def name(self) -> str:
        return name_of(self.template)

    def query(self, prompt: str, choices: list[str]) -> Query:
        """A prompt up to where the answer begins, and what each choice adds to it as the answer."""
        contexts = []
        continuations = []
        for choice in choices:
            conversation = Conversation((Turn(prompt, choice.strip()),))
            ids, mask = encode_document(self.tokenizer, conversation, self.template, True)
            assert mask is not None
            start = mask.index(1)
            num_targets = sum(mask)
            contexts.append(ids[:start])
            continuations.append(ids[start : start + num_targets - 1])  # the last one ends it
        if any(context != contexts[0] for context in contexts):
            raise UserError(
                f"--template {self.name}: the tokens of a prompt depend on the answer behind it; "
                "choose another template"
            )
        return Query(contexts[0], continuations)

    def context(self, prompt: str) -> list[int]:
        """The ids of a prompt that waits for an answer."""
        conversation = Conversation((Turn(prompt, None),))
        return encode_document(self.tokenizer, conversation, self.template, append_eod=False)[0]
