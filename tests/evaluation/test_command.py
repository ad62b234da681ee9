"""eval.py: what it prints and writes, and one line for each mistake."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minillama import device_list
from minillama.checkpoint.hf_reader import load_model
from minillama.comm import Mesh
from minillama.errors import UserError
from minillama.evaluation.protocols import TASKS
from minillama.evaluation.runner import predict
from minillama.grid import make_grid
from minillama.lora import LoraConfig, add_lora, merge_lora, save_adapter
from minillama.tokenizer import open_tokenizer


def read_predictions(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def test_a_score_is_written_with_all_that_it_depends_on(
    main: Callable,
    boolq: list[str],
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "out"
    assert main([*boolq, "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    expected = {
        "task": "boolq",
        "protocol": "ascend",
        "n_shots": 0,
        "bos": True,
        "split": "dev",
        "n": 10,
        "model": str(checkpoint),
        "data_sha256": hashlib.sha256((data / "dev.jsonl").read_bytes()).hexdigest(),
        "majority": 0.6,
    }
    assert {key: summary[key] for key in expected} == expected
    assert summary["example_prompt"].endswith("?\nAnswer:")
    assert "seconds" in summary
    predictions = read_predictions(out)
    assert [record["id"] for record in predictions] == [f"boolq/{i}" for i in range(10)]
    assert predictions[0].keys() == {"id", "subject", "gold", "predicted", "scores", "digest"}
    num_correct = sum(record["gold"] == record["predicted"] for record in predictions)
    assert summary["accuracy"] == num_correct / 10
    assert "protocol ascend, 0 shots, with BOS, split dev" in capsys.readouterr().out


def test_a_score_is_compared_with_another_summary(
    main: Callable, boolq: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    main([*boolq, "--out", str(tmp_path / "out")])
    main([*boolq, "--compare", str(tmp_path / "out/summary.json")])
    assert "+0.00%" in capsys.readouterr().out
    other = tmp_path / "other.json"
    other.write_text('{"task": "boolq"}')
    with pytest.raises(UserError, match=r"other\.json: key 'accuracy' is missing"):
        main([*boolq, "--compare", str(other)])
    other.write_text('{"task": "mmlu", "accuracy": 0.5}')
    with pytest.raises(UserError, match="not a summary of --task boolq, but of 'mmlu'"):
        main([*boolq, "--compare", str(other)])


def test_finished_predictions_are_refused_under_another_protocol_or_damaged(
    main: Callable, boolq: list[str], tmp_path: Path
) -> None:
    command = [*boolq, "--out", str(tmp_path / "out")]
    main(command)
    with pytest.raises(UserError, match="protocol = 'ascend', now it is 'lm_eval'"):
        main([*command, "--protocol", "lm_eval"])
    with open(tmp_path / "out/predictions.jsonl", "a", encoding="utf-8") as file:
        file.write("junk\n")
    with pytest.raises(UserError, match=r"predictions\.jsonl: line 11: not valid JSON"):
        main(command)


def test_a_rank_loads_the_model_onto_its_own_chip_and_no_other(
    main: Callable, boolq: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picked = []

    def pick(name: str, local_rank: int = 0) -> torch.device:
        picked.append(local_rank)
        return torch.device("cpu")

    monkeypatch.setattr(device_list, "pick", pick)
    monkeypatch.setenv("LOCAL_RANK", "3")
    main(boolq)
    assert picked == [3]


def test_an_adapter_is_scored_as_its_merged_model(
    main: Callable, checkpoint: Path, benchmark: Callable, data: Path, tmp_path: Path
) -> None:
    config = LoraConfig(rank=2)
    model = load_model(checkpoint)
    add_lora(model, config, torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapter = tmp_path / "adapter"
    save_adapter(model, config, adapter, str(checkpoint))
    merge_lora(model)
    test = benchmark("mmlu", tokenizer=open_tokenizer(checkpoint))
    merged = predict(model.eval(), test, 4, None, {}, make_grid(Mesh()))

    command = ["--task", "mmlu", "--data", str(data / "mmlu"), "--out"]
    base_and_lora = [*command, str(tmp_path / "a"), "--ckpt", str(checkpoint)]
    main([*base_and_lora, "--lora", str(adapter)])
    main([*command, str(tmp_path / "b"), "--ckpt", str(adapter)])
    main([*command, str(tmp_path / "c"), "--ckpt", str(checkpoint)])
    with_lora, from_adapter, base = (read_predictions(tmp_path / name) for name in "abc")
    assert with_lora == from_adapter != base
    for record, expected in zip(with_lora, merged, strict=True):
        assert record["id"] == expected["id"]
        assert record["scores"] == pytest.approx(expected["scores"], abs=1e-4)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "--task boolq",
            r"--ckpt and --data missing; "
            r"type: python eval.py --task boolq --ckpt LLAMA_DIR --data boolq/dev.jsonl; boolq is "
            r"published at https://github.com/google-research-datasets/boolean-questions$",
        ),
        ("--task mmlu --ckpt x", "^--data missing; .*hendrycks/test$"),
        ("--task loss", "--data and --compare missing"),
        ("--task demo", "--ckpt missing; .*--ckpt runs/demo"),
        ("--task bolq", "did you mean 'boolq'"),
        ("", "--task NAME is missing"),
        ("--task boolq --ckpt x --data y --batch_size 0", "--batch_size 0: must be at least 1"),
        ("--task boolq --ckpt x --data y --limit -1", "--limit -1: must be at least 0"),
        (
            "--task perplexity --ckpt x --data y --n_shots 5",
            "--n_shots has no meaning for --task perplexity",
        ),
        ("--task demo --ckpt x --data y", "--data has no meaning for --task demo"),
        ("--task loss --ckpt x --data y", "--ckpt has no meaning for --task loss"),
    ],
)
def test_a_missing_flag_is_named_with_the_command_to_type(
    main: Callable, command: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        main(command.split())


def test_a_protocol_or_length_that_does_not_exist_is_refused(
    main: Callable, boolq: list[str]
) -> None:
    with pytest.raises(UserError, match=r"boolq has no protocol 'ascent' .did you mean 'ascend'"):
        main([*boolq, "--protocol", "ascent"])
    perplexity = ["--task", "perplexity", *boolq[2:]]
    with pytest.raises(UserError, match="perplexity has no protocol 'ascend'; protocols: rolling"):
        main([*perplexity, "--protocol", "ascend"])
    message = "--max_length 513: must be from 2 to the model's context of 512 tokens"
    with pytest.raises(UserError, match=message):
        main([*boolq, "--max_length", "513"])


def test_list_tasks_prints_every_layout(main: Callable, capsys: pytest.CaptureFixture) -> None:
    main(["--list_tasks"])
    printed = capsys.readouterr().out
    for name, task in TASKS.items():
        assert name in printed
        assert task.layout in printed
