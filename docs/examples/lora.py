"""LoRA in twenty lines: two thin matrices a layer teach a trained model another answer."""

import torch

import minillama
from minillama.lora import LoraConfig, add_lora, merge_lora
from minillama.ops import IGNORE

loaded = minillama.load("tests/golden/model", device="cpu")
model = loaded.model
prompt = loaded.tokenizer.encode("Human: Which number is larger, 31 or 62?\nAssistant: ")
answer = loaded.tokenizer.encode("cat")  # it says 62
tokens = torch.tensor([prompt + answer[:-1]])  # (1, T)
labels = torch.tensor([[IGNORE] * (len(prompt) - 1) + answer])  # (1, T)

config = LoraConfig(rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"))
add_lora(model, config, torch.Generator().manual_seed(0))
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
num_trained = sum(parameter.numel() for parameter in trained)
print(f"{num_trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters are trained")

optimizer = torch.optim.AdamW(trained, lr=1e-2)
for step in range(31):
    loss = model.loss_sum(tokens, labels) / len(answer)
    if step % 10 == 0:
        print(f"step {step:2}   loss {loss.item():.3f}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

unmerged = model.logits(model(tokens))
merge_lora(model)
print("merged equals unmerged:", torch.allclose(model.logits(model(tokens)), unmerged, atol=1e-4))
