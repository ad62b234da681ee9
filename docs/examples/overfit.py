"""Overfit one sentence: the shortest proof that a model, its loss and its optimizer work together.

The model sees nothing but one sentence. Its loss has to fall to 0, and then it can write it down.
"""

from dataclasses import replace

import torch

from minillama.hf_config import published
from minillama.model import Llama
from minillama.tokenizer import open_tokenizer

tokenizer = open_tokenizer("tests/golden/model")
ids = [tokenizer.bos_id, *tokenizer.encode("the cat has a boat"), tokenizer.eos_id]
tokens = torch.tensor([ids[:-1]])  # (1, T)
labels = torch.tensor([ids[1:]])  # (1, T): the next token at each position

shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "ffn_dim": 96}
config = replace(published("1.1b"), **shape, vocab_size=tokenizer.size)
model = Llama(config).initialise(torch.Generator().manual_seed(0))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(61):
    loss = model.loss_sum(tokens, labels) / labels.numel()
    if step % 20 == 0:
        print(f"step {step:2}   loss {loss.item():.3f}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

written = [ids[0]]
while written[-1] != tokenizer.eos_id:
    logits = model.logits(model(torch.tensor([written])))  # (1, T, V)
    written.append(int(logits[0, -1].argmax()))
print(tokenizer.decode(written[1:-1]))
