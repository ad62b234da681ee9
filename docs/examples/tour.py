# %% [markdown]
# # A tour: one record, from JSON to a changed weight
#
# **The problem.** A training run reads records and changes weights. Between the two are a dozen
# steps, and each is easy to believe and hard to see.
#
# **The idea.** Follow one record all the way, with the actual numbers of a small model: the shape
# of the demo, with random weights from a fixed seed. Nothing has to be downloaded. After it you can
# compute by hand what one training step does to one weight, and find the line of code that does it.
#
# The page is made from [examples/tour.py](examples/tour.py). Run it and change it, or open it as a
# notebook: [examples/tour.ipynb](examples/tour.ipynb).
#
# ```bash
# python docs/examples/tour.py
# ```
#
# ![The way of the data](figures/data.svg)

# %%
import json
import math
import tempfile
from pathlib import Path

import torch

from minillama.chat import render
from minillama.comm import Mesh
from minillama.data.batches import BatchPlan
from minillama.data.demo import write_demo
from minillama.data.encode import encode_pieces
from minillama.data.formats import parse
from minillama.data.memmap import Dataset
from minillama.data.records import InputRecord
from minillama.data.sources import Source
from minillama.data.tokenize import DataOptions, build_dataset
from minillama.data.windows import TrainingWindows
from minillama.grid import make_grid
from minillama.model import Llama
from minillama.ops import IGNORE, Documents, reference, rope_tables
from minillama.parallel.sharded_optimizer import ShardedOptimizer
from minillama.tokenizer import open_tokenizer
from minillama.training.api import preset
from minillama.training.architecture import model_config

torch.set_num_threads(1)
folder = Path(tempfile.mkdtemp())


def numbers(values: torch.Tensor) -> str:
    return " ".join(f"{value:7.4f}" for value in values.tolist())


# %% [markdown]
# ## 1. The record
#
# Two records of Alpaca's format: an instruction, an input that may be empty, and the answer. We
# follow the first one. The second one is there because a row holds several documents.

# %%
record = {"instruction": "What is the first word in frog, apple, snow?", "output": "frog"}
second = {"instruction": "Please repeat cat, dog.", "output": "cat, dog"}
data_file = folder / "records.json"
data_file.write_text(json.dumps([record, second]), encoding="utf-8")
print(json.dumps(record))

# %% [markdown]
# ## 2. A conversation in pieces
#
# [formats.py](../minillama/data/formats.py) reads what the keys mean.
# [chat.py](../minillama/chat.py) puts the conversation into a prompt template, here the one of the
# demo. The result is a list of pieces, and each piece knows whether it is trained on. EOS,
# the token that ends an answer, is a piece of its own, which is added by its id: no text can
# produce it.

# %%
source = Source(data_file, data_format="alpaca")
conversation = parse(source, InputRecord("record 1", record)).documents[0]
pieces = render("llama_factory_default", conversation)
for piece in pieces:
    kind = "trained on" if piece.is_target else "context"
    print(f"{kind:<12}{piece.control.upper() or repr(piece.text)}")

# %% [markdown]
# ## 3. Ids and labels
#
# The demo's tokenizer has 640 tokens. `encode_pieces` ([encode.py](../minillama/data/encode.py))
# encodes piece after piece, so ids and mask grow side by side. A model predicts the next token. So
# the label of a position is the id of the *next* position, if that one is trained on, and otherwise
# -100, which means "no label".
#
# `▁` is a space. The answer is `▁frog` and `</s>`: two targets. The first of them, 356, is the
# label of position 16, the last one of the prompt.

# %%
_, tokenizer_file = write_demo("demo", folder)
tokenizer = open_tokenizer(tokenizer_file)
ids, mask = encode_pieces(tokenizer, pieces)
labels = [IGNORE] * len(ids)
for position in range(len(ids) - 1):
    if mask[position + 1]:
        labels[position] = ids[position + 1]
print("position    id  token         mask  label")
for position, token in enumerate(ids):
    name = repr(tokenizer.name_of(token))
    print(f"{position:8}{token:6}  {name:<12}{mask[position]:6}{labels[position]:7}")

# %% [markdown]
# ## 4. A packed row
#
# The same happens to every record of a file, once. The ids of all documents are stored end to end
# ([memmap.py](../minillama/data/memmap.py)). A row of a batch is filled with whole documents
# ([batches.py](../minillama/data/batches.py)): no token is spent on padding. Positions start at 0
# in each document, and a token sees only the tokens before it in its own document. So the loss of a
# row is the sum of the losses of its documents.
#
# ![A packed row and its mask](figures/packing.svg)

# %%
options = DataOptions(template="llama_factory_default", quiet=True)
build_dataset([data_file], tokenizer, folder / "records", options)
windows = TrainingWindows(Dataset(folder / "records"), max_length=256)
plan = BatchPlan(windows, rows_per_step=1, rows_per_micro_batch=1, seed=42, shuffle=False)
batch = plan.micro_batches(step=0)[0]
documents = Documents(batch.lengths)
assert batch.tokens[: len(ids)].tolist() == ids
assert batch.labels[: len(ids)].tolist() == labels
positions = documents.positions.tolist()
for start, end in ((0, len(ids)), (len(ids), len(batch.tokens))):
    print("token    ", "".join(f"{token:5}" for token in batch.tokens[start:end]))
    print("label    ", "".join(f"{label:5}" for label in batch.labels[start:end]))
    print("position ", "".join(f"{place:5}" for place in positions[start:end]))
    print()
print("lengths", batch.lengths)
print("targets", batch.targets)

# %% [markdown]
# ## 5. The embedding
#
# The demo's model has width C = 128, 4 layers, 4 query heads and 2 key/value heads of size D = 32,
# and 902,272 parameters. Its matrices are sampled from a normal distribution of standard deviation
# 0.06. The embedding is a table with a row for each token of the vocabulary. A token's row is where
# the residual stream begins. Below are the first six of its 128 numbers, for the last token of the
# prompt.

# %%
config = preset("demo")
shape = model_config(config, None, tokenizer.size)
model = Llama(shape).initialise(torch.Generator().manual_seed(42))
tokens = torch.from_numpy(batch.tokens).unsqueeze(0)  # (1, T)
target_labels = torch.from_numpy(batch.labels).unsqueeze(0)  # (1, T)
here = len(ids) - 3  # the position that predicts the answer
x = model.model.embed_tokens(tokens)  # (1, T, C)
print("parameters  ", f"{sum(weight.numel() for weight in model.parameters()):,}")
print("token       ", repr(tokenizer.name_of(ids[here])))
print("x           ", numbers(x[0, here, :6]), "...")

# %% [markdown]
# ## 6. One attention head
#
# The first layer normalises x to mean square 1, and makes queries, keys and values of it. RoPE
# turns each pair of a query and of a key by an angle that grows with the position. The formulas are
# in [ops/reference.py](../minillama/ops/reference.py):
#
#     norm(x) = x / sqrt(mean(x²) + ε) · w       score = q · k / √D       weight = softmax(score)
#
# Head 0 at position 16 compares its query with the keys of the 17 positions so far. It sees nothing
# of the second document. Random weights have no preference yet: no score is far from 0, and no
# weight far from 1/17 = 0.0588.

# %%
layer = model.model.layers[0]
attention = layer.self_attn
normed = layer.input_layernorm(x)  # (1, T, C)
T = tokens.shape[1]
q = attention.q_proj(normed).view(1, T, -1, shape.head_dim)  # (1, T, H, D)
k = attention.k_proj(normed).view(1, T, -1, shape.head_dim)  # (1, T, K, D)
v = attention.v_proj(normed).view(1, T, -1, shape.head_dim)  # (1, T, K, D)
cos, sin = rope_tables(shape, length=T)  # (T, 1, D) each
q = reference.rope(q, cos[documents.positions], sin[documents.positions])
k = reference.rope(k, cos[documents.positions], sin[documents.positions])

scores = k[0, : here + 1, 0] @ q[0, here, 0] / math.sqrt(shape.head_dim)  # (17,)
weights = scores.softmax(dim=0)  # (17,)
head_output = weights @ v[0, : here + 1, 0]  # (D,)
assert torch.allclose(head_output, reference.attention(q, k, v, documents)[0, here, 0], atol=1e-5)
print("norm(x)     ", numbers(normed[0, here, :6]), "...")
print("score       ", numbers(scores[:6]), "...")
print("weight      ", numbers(weights[:6]), f"...  sum {weights.sum():.4f}")
print("head output ", numbers(head_output[:6]), "...")

# %% [markdown]
# ## 7. Logits and the loss of one token
#
# After four layers, a last norm gives the hidden state h. The head multiplies it with the row of
# each token of the vocabulary: 640 logits. Softmax makes probabilities of them, and the loss of the
# target is -log of its probability. A model that knows nothing gives each token 1/640, so a loss
# near ln 640 = 6.46 is what to expect.

# %%
hidden = model(tokens, documents)  # (1, T, C)
logits = model.logits(hidden[0, here])  # (V,)
probabilities = logits.softmax(dim=0)  # (V,)
target = labels[here]
print("target      ", target, repr(tokenizer.name_of(target)))
print("logit       ", f"{logits[target]:.4f} of {logits.min():.4f} to {logits.max():.4f}")
print("log-sum-exp ", f"{logits.logsumexp(dim=0):.4f}")
print("probability ", f"{probabilities[target]:.6f}")
print("loss        ", f"{-probabilities[target].log():.4f}")

# %% [markdown]
# ## 8. The loss of the batch
#
# The loss of a step is the mean over all targets of its batch, whichever documents, micro-batches
# or ranks they are in ([trainer.py](../minillama/training/trainer.py)). Only the positions with a
# label reach the head.

# %%
target_positions = [index for index, label in enumerate(batch.labels) if label != IGNORE]
total = 0.0
for position in target_positions:
    label = int(batch.labels[position])
    loss_here = -model.logits(hidden[0, position]).log_softmax(dim=0)[label].item()
    total += loss_here
    print(f"position {position:2}   {loss_here:.4f}   {tokenizer.name_of(label)!r}")
M = batch.targets
loss = model.loss_sum(tokens, target_labels, documents) / M
assert math.isclose(loss.item(), total / M, rel_tol=1e-5)
print(f"mean          {loss.item():.4f}   of {M} targets")

# %% [markdown]
# ## 9. The gradient of one weight
#
# We follow the weight w in row 356 (`▁frog`), column 0 of the head. It enters the logit of `▁frog`
# at each position, multiplied by the first number of h there. The derivative of a loss by a logit
# is p - 1 for the target, and p for any other token. So
#
#     ∂loss/∂w = Σ over positions with a label: (p - [label is ▁frog]) · h[0] / M
#
# Only position 16 has the label `▁frog`. The other positions push the logit of `▁frog` down, each
# by a little.

# %%
gradient = 0.0
for position in target_positions:
    h = hidden[0, position].detach()
    p = model.logits(h).softmax(dim=0)[target].item()
    is_label = float(batch.labels[position] == target)
    part = (p - is_label) * h[0].item() / M
    gradient += part
    print(f"position {position:2}   p {p:.6f}   h[0] {h[0]:7.4f}   part {part:9.6f}")
loss.backward()
by_autograd = model.lm_head.weight.grad[target, 0].item()
assert math.isclose(gradient, by_autograd, rel_tol=1e-4)
print(f"sum                                    {gradient:9.6f}   autograd {by_autograd:9.6f}")

# %% [markdown]
# ## 10. Clipping
#
# The norm is taken over the gradients of all parameters together. If it is more than 1
# (`max_grad_norm`), all of them are multiplied by 1 / norm. This keeps the direction
# ([sharded_optimizer.py](../minillama/parallel/sharded_optimizer.py)).

# %%
squares = [weight.grad.square().sum() for weight in model.parameters()]
norm = math.sqrt(sum(squares))
clip = min(1.0, config.max_grad_norm / (norm + 1e-6))
clipped = gradient * clip
print("norm        ", f"{norm:.4f}")
print("factor      ", f"{clip:.4f}")
print("gradient    ", f"{gradient:.6f} becomes {clipped:.6f}")

# %% [markdown]
# ## 11. AdamW
#
# Two running means are kept for each weight: m of its gradient g, v of g². Both start at 0. So they
# are divided by what is missing from their beginning, after t steps:
#
#     m ← β₁ m + (1 - β₁) g                 m̂ = m / (1 - β₁ᵗ)
#     v ← β₂ v + (1 - β₂) g²                v̂ = v / (1 - β₂ᵗ)
#     w ← w - η λ w - η m̂ / (√v̂ + ε)
#
# In the first step m̂ = g and v̂ = g², so m̂ / √v̂ is +1 or -1: each weight moves by the learning
# rate, whatever the size of its gradient. The term η λ w is the weight decay. The schedule of a
# real run begins with a rate of 0 and reaches η = 0.002 after 30 steps; this step takes that rate.

# %%
w = model.lm_head.weight[target, 0].item()
rate = config.learning_rate
m = (1 - config.adam_beta1) * clipped
v_mean = (1 - config.adam_beta2) * clipped**2
m_hat = m / (1 - config.adam_beta1)
v_hat = v_mean / (1 - config.adam_beta2)
step = rate * m_hat / (math.sqrt(v_hat) + config.adam_epsilon)
decay = rate * config.weight_decay * w
new_w = w - decay - step
print("m           ", f"{m:.4e}   v       {v_mean:.4e}")
print("m_hat       ", f"{m_hat:.4e}   √v_hat  {math.sqrt(v_hat):.4e}")
print("step        ", f"{step:.6f}      decay   {decay:.6f}")
print("w           ", f"{w:.6f} becomes {new_w:.6f}")

# %% [markdown]
# ## 12. The same by the trainer's optimizer
#
# [zero.py](../minillama/parallel/zero.py) puts all parameters end to end in one vector and updates
# it with the formula above. On several ranks each of them updates a slice.

# %%
model.zero_grad()
grid = make_grid(Mesh())
optimizer = ShardedOptimizer(model.named_parameters(), grid, config)


def train_step() -> float:
    optimizer.zero_grad()
    loss = model.loss_sum(tokens, target_labels, documents) / M
    optimizer.backward(loss, active_ranks=1)
    optimizer.step(rate, config.max_grad_norm)
    return loss.item()


train_step()
changed_w = model.lm_head.weight[target, 0].item()
assert math.isclose(changed_w, new_w, rel_tol=1e-4)
print("w           ", f"{changed_w:.6f}")

# %% [markdown]
# ## 13. Again and again
#
# The same batch gives a smaller loss after the step. After some more steps the model has learnt the
# two answers by heart. With 56,000 questions in place of two it learns the task: `python train.py`.

# %%
for count in range(1, 31):
    loss_now = train_step()
    if count in (1, 5, 10, 20, 30):
        print(f"after {count:2} steps   loss {loss_now:.3f}")
with torch.no_grad():
    likeliest = model.logits(model(tokens, documents)).argmax(dim=-1)  # (1, T)
answer = [tokenizer.name_of(token) for token in likeliest[0, target_positions].tolist()]
print("the likeliest token at each target:", *answer)

# %% [markdown]
# **Exercise.** Why is the loss of the packed row the sum of the losses of its two documents?
# Compute both, then read `test_the_loss_of_packed_documents_is_the_sum_of_their_losses` in
# [test_packing.py](../tests/test_packing.py).
#
# **Next**: [data](data.md), from a file to what is trained on.
