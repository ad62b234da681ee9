"""Evaluate from Python: a benchmark by likelihood, and the likelihood of two answers by hand."""

import torch

import minillama

model = minillama.load("tests/golden/model", template="llama_factory_default", device="cpu")
print(minillama.evaluate("demo", model, limit=30, subjects=["first", "repeat"]))


def log_likelihood(prompt: str, answer: str) -> float:
    """Sum of log p(token | all tokens before it) over the tokens of the answer."""
    prompt_ids = model.tokenizer.encode(prompt)
    ids = torch.tensor([prompt_ids + model.tokenizer.encode(answer)])  # (1, T)
    with torch.no_grad():
        log_p = model.model.logits(model.model(ids)).log_softmax(dim=-1)  # (1, T, V)
    total = 0.0
    for position in range(len(prompt_ids), ids.shape[1]):
        total += log_p[0, position - 1, ids[0, position]].item()
    return total


question = "Human: Which number is larger, 31 or 62?\nAssistant: "
for answer in ("62", "31"):
    print(f"log p({answer}) = {log_likelihood(question, answer):.2f}")
