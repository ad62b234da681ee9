"""Equality with transformers and peft, as files: what they computed with a model trained here.

`golden/make_golden.py` made them. Nothing here imports either package, so a fresh clone proves the
equality by itself.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minillama import chat
from minillama.checkpoint.hf_reader import load_model
from minillama.comm import Mesh
from minillama.data.encode import encode_pieces
from minillama.generation.sampling import Sampling
from minillama.grid import make_grid
from minillama.hf_config import stop_ids
from minillama.lora import load_adapter, merge_lora
from minillama.model import Llama
from minillama.ops import IGNORE, Documents
from minillama.parallel.sharded_optimizer import ShardedOptimizer
from minillama.tokenizer import open_tokenizer
from minillama.train_config import TrainConfig
from tests.conftest import generate
from tests.peers import assert_same_logits

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
TENSORS = load_file(GOLDEN / "expected.safetensors")


@pytest.fixture
def model() -> Llama:
    return load_model(GOLDEN / "model")


def test_the_files_stay_small() -> None:
    assert (
        sum(path.stat().st_size for path in GOLDEN.rglob("*") if "__pycache__" not in path.parts)
        <= 1_000_000
    )


@torch.no_grad()
def test_logits(model: Llama) -> None:
    assert_same_logits(model.logits(model(TENSORS["tokens"])), TENSORS["logits"])


@torch.no_grad()
def test_logits_with_pefts_adapter(model: Llama) -> None:
    load_adapter(model, GOLDEN / "adapter")
    assert_same_logits(model.logits(model(TENSORS["tokens"])), TENSORS["adapted_logits"])
    assert (
        TENSORS["adapted_logits"] - TENSORS["logits"]
    ).abs().max() > 1.0  # the adapter does something


def test_merging_gives_pefts_weights(model: Llama) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    load_adapter(model, GOLDEN / "adapter")
    merge_lora(model)
    for name, p in model.named_parameters():
        expected = TENSORS.get(f"merged.{name}", before[name])
        assert torch.allclose(p, expected, rtol=0.0, atol=1e-6), name


@pytest.mark.parametrize("expected", EXPECTED["greedy"], ids=lambda e: e["question"])
def test_greedy_tokens_from_the_question_on(expected: dict, model: Llama) -> None:
    tokenizer = open_tokenizer(GOLDEN / "model")
    prompt, _ = encode_pieces(
        tokenizer,
        chat.render(
            "llama_factory_default", chat.Conversation((chat.Turn(expected["question"], None),))
        ),
    )
    assert prompt == expected["prompt"]
    stop = stop_ids(GOLDEN / "model", model.config)
    assert list(generate(model, prompt, 24, Sampling(temperature=0.0), stop)) == expected["ids"]


@pytest.mark.parametrize(
    "expected", EXPECTED["log_likelihood"], ids=range(len(EXPECTED["log_likelihood"]))
)
def test_likelihoods_of_texts(expected: dict, model: Llama) -> None:
    ids = torch.tensor([expected["ids"]])
    with torch.no_grad():
        assert -float(model.loss_sum(ids[:, :-1], ids[:, 1:])) == pytest.approx(
            expected["sum"], rel=1e-5
        )


def packed(rows: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """(tokens, labels, lengths) of a batch of rows that end in -1s: the documents end to end."""
    documents = [row[row >= 0].long() for row in rows]
    labels = [torch.cat((ids[1:], torch.tensor([IGNORE]))) for ids in documents]
    return torch.cat(documents)[None], torch.cat(labels)[None], [len(ids) for ids in documents]


def losses(model: Llama) -> list[float]:
    """The training that `make_golden.losses` did with torch's AdamW on padded rows."""
    optimizer = ShardedOptimizer(
        model.named_parameters(), make_grid(Mesh()), TrainConfig(adam_beta2=0.95, weight_decay=0.1)
    )
    found = []
    for rows in TENSORS["batches"]:
        tokens, labels, lengths = packed(rows)
        optimizer.zero_grad()
        loss = model.loss_sum(tokens, labels, Documents(lengths)) / (labels != IGNORE).sum()
        optimizer.backward(loss, 1)
        optimizer.step(1e-3, max_norm=1.0)
        found.append(loss.item())
    return found


def test_twenty_training_losses(model: Llama) -> None:
    assert losses(model) == pytest.approx(EXPECTED["losses"], rel=1e-4)


def test_twenty_training_losses_of_the_adapter(model: Llama) -> None:
    load_adapter(model, GOLDEN / "adapter")
    assert losses(model) == pytest.approx(EXPECTED["lora_losses"], rel=1e-4)
