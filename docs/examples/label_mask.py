"""Look at a label mask: which tokens of a conversation are trained on, in any prompt template.

A wrong mask is no error: the model learns to write questions, or never learns to stop. So look.
"""

import sys

from minillama.chat import Conversation, Turn, render
from minillama.data.encode import encode_pieces
from minillama.tokenizer import open_tokenizer

template = sys.argv[1] if len(sys.argv) > 1 else "llama_factory_default"
tokenizer = open_tokenizer("tests/golden/model")
first = Turn("Please repeat cat, dog.", "cat, dog")
second = Turn("Which number is larger, 31 or 62?", "62")
ids, mask = encode_pieces(tokenizer, render(template, Conversation((first, second))))
assert len(ids) == len(mask)

line = []
for token, is_target in zip(ids, mask, strict=True):
    name = tokenizer.name_of(token).replace("\n", "\\n")
    line.append(f"[{name}]" if is_target else name)
print(*line)
print(f"{len(ids)} tokens, {sum(mask)} trained on: those in brackets")
