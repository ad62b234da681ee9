"""Make the files beside this one: a LLaMA trained by this project, and what transformers and peft compute with it.

    python -m tests.golden.make_golden        a minute; needs the extra `test`

`test_golden.py` compares minillama with these files, so the equality can be checked where neither package is installed.

    model/                  the checkpoint: grouped heads, rotary positions scaled as in LLaMA 3.1
    adapter/                a LoRA adapter written by peft: rsLoRA, a rank pattern
    expected.safetensors    logits of `tokens`, plain and adapted; the merged weights; the training batches
    expected.json           greedy ids, training losses (all weights; LoRA), log-likelihoods of texts
"""

import json
import re
import shutil
import tempfile
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

from minillama.comm import Mesh
from minillama.data import demo
from minillama.tokenizer import open_tokenizer, train_tokenizer
from minillama.train_config import TrainConfig
from minillama.training import trainer

HERE = Path(__file__).parent
QUESTIONS = (
    "What is the first word in key, moon and goat?",
    "Which number is larger, 31 or 62?",
    "Please repeat owl, fish and tree.",
)
TEXTS = (
    "Human: Which number is larger, 40 or 12?\nAssistant: 40",
    "Human: Which number is larger, 40 or 12?\nAssistant: 12",
    "It was a dark and stormy night; 夜.",
)
STEPS, RATE, DECAY, BETAS = 20, 1e-3, 0.1, (0.9, 0.95)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        train_model(Path(folder))
    model = open_model()
    tokenizer = open_tokenizer(HERE / "model")
    records = demo.records(demo.DEMO, 8 * STEPS, seed=3, held_out=True)
    documents = [
        [1, *tokenizer.encode(f"Human: {r['instruction']}\nAssistant: {r['output']}")[:30], 2]
        for r in records
    ]
    tokens = torch.tensor([(row * 2)[:32] for row in documents[:2]])
    tensors = {"tokens": tokens, "logits": logits(model, tokens), "batches": padded(documents)}
    expected = {
        "greedy": [greedy(model, tokenizer, question) for question in QUESTIONS],
        "log_likelihood": [log_likelihood(model, [1, *tokenizer.encode(text)]) for text in TEXTS],
    }
    adapted = make_adapter(model)
    tensors["adapted_logits"] = logits(adapted, tokens)
    expected["lora_losses"] = losses(adapted.train(), tensors["batches"])
    merged = peft.PeftModel.from_pretrained(open_model(), HERE / "adapter").merge_and_unload()
    plain = open_model().state_dict()
    tensors |= {
        f"merged.{name}": weight.contiguous()
        for name, weight in merged.state_dict().items()
        if not torch.equal(weight, plain[name])
    }
    expected["losses"] = losses(open_model().train(), tensors["batches"])
    save_file(tensors, HERE / "expected.safetensors")
    expected["made_with"] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    text = json.dumps(expected, indent=1)
    lines = re.sub(
        r"\[[-\d., \n]+\]", lambda found: " ".join(found[0].split()), text
    )  # a list of numbers stands on one line
    (HERE / "expected.json").write_text(lines + "\n")


def train_model(folder: Path) -> None:
    """Pre-train on the demo's questions, then give the checkpoint a longer context by llama3 scaling, as LLaMA 3.1 was."""
    records = demo.records(demo.DEMO, 6000, seed=0, held_out=False)
    (folder / "data.json").write_text(json.dumps(records))
    texts = [f"Human: {r['instruction']}\nAssistant: {r['output']}" for r in records[:1000]]
    (folder / "tokenizer.model").write_bytes(train_tokenizer(texts, 400))
    settings = TrainConfig(
        init="scratch",
        tokenizer=str(folder / "tokenizer.model"),
        dim=48,
        n_layers=2,
        n_heads=6,
        n_kv_heads=2,
        ffn_dim=112,
        context=128,
        initializer_range=0.08,
        data=(str(folder / "data.json"),),
        template="llama_factory_default",
        max_length=128,
        num_train_epochs=8.0,
        per_device_train_batch_size=6,
        learning_rate=6e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.1,
        adam_beta2=0.95,
        save_strategy="no",
        cache_dir=str(folder),
        out_dir=str(folder / "run"),
        device="cpu",
        threads=1,
    )
    print(trainer.train(settings, Mesh()))
    shutil.rmtree(HERE / "model", ignore_errors=True)
    shutil.copytree(
        folder / "run/final", HERE / "model", ignore=shutil.ignore_patterns("minillama.json")
    )
    config = json.loads((HERE / "model/config.json").read_text())
    config |= {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        "max_position_embeddings": 512,
    }
    (HERE / "model/config.json").write_text(json.dumps(config, indent=2) + "\n")


def open_model() -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(
        HERE / "model", dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens).logits.contiguous()


def greedy(model: torch.nn.Module, tokenizer, question: str) -> dict:
    ids = tokenizer.encode(f"Human: {question}\nAssistant: ")
    out = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=0)[
        0, len(ids) :
    ].tolist()
    return {"question": question, "prompt": ids, "ids": [token for token in out if token != 2]}


def log_likelihood(model: torch.nn.Module, ids: list[int]) -> dict:
    log_p = logits(model, torch.tensor([ids]))[0].log_softmax(-1)
    return {"ids": ids, "sum": sum(float(log_p[i, token]) for i, token in enumerate(ids[1:]))}


def make_adapter(model: torch.nn.Module) -> torch.nn.Module:
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["q_proj", "v_proj", "down_proj"],
            use_rslora=True,
            rank_pattern={"v_proj": 2},
            task_type="CAUSAL_LM",
        ),
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    adapted.save_pretrained(HERE / "adapter")
    (HERE / "adapter/README.md").unlink(missing_ok=True)
    about = json.loads((HERE / "adapter/adapter_config.json").read_text()) | {
        "base_model_name_or_path": "model"
    }
    (HERE / "adapter/adapter_config.json").write_text(json.dumps(about, indent=2) + "\n")
    return adapted.eval()


def padded(documents: list[list[int]]) -> torch.Tensor:
    """(steps, 8, 32) of ids; -1 where there is none."""
    rows = torch.full((len(documents), 32), -1)
    for row, ids in zip(rows, documents, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return rows.view(-1, 8, 32).to(torch.int16)


def losses(model: torch.nn.Module, batches: torch.Tensor) -> list[float]:
    """AdamW at a constant rate, decay on matrices, clipped to norm 1; the loss is the mean over a batch's targets."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": DECAY},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=RATE,
        betas=BETAS,
    )
    found = []
    for rows in batches.long():
        here = rows >= 0
        out = model(input_ids=rows.clamp(min=0), attention_mask=here.long()).logits
        labels = rows.masked_fill(~here, -100)[:, 1:]
        loss = F.cross_entropy(out[:, :-1].flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


if __name__ == "__main__":
    main()
