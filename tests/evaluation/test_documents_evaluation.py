"""The documents' commands for evaluation, typed after eval.py on a tiny model."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from minillama.compat.evaluation_flags import ASCENDSPEED_TASKS, ONE_TOKEN_TASKS
from minillama.errors import UserError
from minillama.evaluation.protocols import TASKS
from tests.evaluation.conftest import ROOT
from tests.published_inference import (
    BOOLQ_13B,
    BOOLQ_34B,
    CEVAL_13B,
    MMLU_7B,
    for_tiny_model,
    words_of,
)

PARSE = runpy.run_path(str(ROOT / "eval.py"))["parse"]


@pytest.fixture
def paths(checkpoint: Path, data: Path, tmp_path: Path) -> dict[str, str]:
    """What stands for MODEL, TOKENIZER, DATA and OUT."""
    return {
        "MODEL": str(checkpoint),
        "TOKENIZER": str(checkpoint),
        "DATA": str(data / "mmlu/test"),
        "OUT": str(tmp_path / "out"),
    }


def for_this_model(command: str, paths: dict[str, str]) -> list[str]:
    """The words of a command, with the tiny model's shape and context."""
    words = for_tiny_model(words_of(command, paths))
    lengths = ["--seq-length", "512", "--max-position-embeddings", "512"]
    return [*words, *lengths]


def test_mmlu_is_scored_from_the_folder_of_its_questions(
    main: Callable, paths: dict[str, str], tmp_path: Path
) -> None:
    """As typed, but for the numbers of the shape. The protocol is AscendSpeed's."""
    main([*for_this_model(MMLU_7B, paths), "--out", paths["OUT"]])
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    found = [summary[name] for name in ("task", "protocol", "n_shots", "n", "max_length")]
    assert found == ["mmlu", "ascend", 5, 15, 512]


@pytest.mark.parametrize("command", [BOOLQ_13B, BOOLQ_34B], ids=["13b", "34b"])
def test_boolq_is_scored_from_a_folder(
    command: str, main: Callable, paths: dict[str, str], data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "boolq/data/test"
    folder.mkdir(parents=True)
    (folder / "dev.jsonl").symlink_to(data / "dev.jsonl")
    words = for_this_model(command, {**paths, "DATA": str(folder)})
    main([*words, "--out", paths["OUT"]])
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["protocol"], summary["n"]) == ("ascend", 10)


def test_ceval_is_scored_from_the_folder_data_and_writes_take0(
    main: Callable,
    paths: dict[str, str],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As typed, in the folder in which the document starts it."""
    (tmp_path / "data").symlink_to(data / "ceval")
    monkeypatch.chdir(tmp_path)
    main(words_of(CEVAL_13B, paths))
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    found = [summary[name] for name in ("task", "protocol", "n_shots")]
    assert found == ["ceval", "chinese_alpaca", 0]
    take = json.loads((tmp_path / "out/take0/summary.json").read_text())
    assert take["All"]["num"] == 15
    assert (tmp_path / "out/take0/submission.json").is_file()
    assert not (tmp_path / "out/summary.csv").exists()


def test_a_command_for_another_model_is_refused_by_the_number_that_differs(
    main: Callable, paths: dict[str, str]
) -> None:
    words = for_this_model(MMLU_7B, paths)
    with pytest.raises(UserError, match="--ffn_hidden_size 11008: the checkpoint has 42"):
        main([*words, "--ffn-hidden-size", "11008"])
    with pytest.raises(UserError, match="--max_position_embeddings 4096: the model's context is 5"):
        main([*words, "--max-position-embeddings", "4096"])
    with pytest.raises(UserError, match="--max_length 4096: must be from 2 to the model's context"):
        main([*words, "--seq-length", "4096"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--model_name_or_path m", {"ckpt": "m"}),
        ("--load m", {"ckpt": "m"}),
        ("--data_path d", {"data": "d"}),
        ("--output_dir o", {"out": "o"}),
        ("--seq-length 9", {"max_length": 9}),
        ("--micro-batch-size 2", {"batch_size": 2}),
        ("--fp16", {"dtype": "float16"}),
        ("--ntrain 3", {"n_shots": 3, "task": ""}),
        ("--few_shot True", {"n_shots": 5, "task": "ceval", "data": "data"}),
        ("--few_shot True --ntrain 2", {"n_shots": 2}),
        ("--few_shot False --ntrain 2", {"n_shots": 0}),
        ("--with_prompt False", {"protocol": "chinese_alpaca_plain"}),
        ("--do_save_csv True", {"csv": True}),
        ("--input_dir d --few_shot False", {"task": "cmmlu", "data": "d"}),
        ("--task cmmlu --data d --few_shot False", {"task": "cmmlu", "data": "d"}),
        ("--task mmlu --task-data-path d", {"data": "d", "protocol": "ascend"}),
        ("--task mmlu --task-data-path d --protocol lm_eval", {"protocol": "lm_eval"}),
        ("--task perplexity --task-data-path d", {"protocol": ""}),
        ("--task mmlu --task-data-path d --seed 42", {"seed": 0}),  # no score depends on it
        ("--task mmlu --max-new-tokens 32", {"task": "mmlu"}),  # choices are scored
        ("--task mmlu", {"protocol": "", "data": "", "n_shots": None, "csv": False}),
    ],
)
def test_what_is_understood_has_the_meaning_of_a_flag_of_ours(
    words: str, expected: dict[str, object]
) -> None:
    flags = PARSE(words.split())
    assert {name: getattr(flags, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--cot True", "--cot True is not supported: an answer is the likeliest choice"),
        ("--constrained_decoding False", "use --constrained_decoding True"),
        ("--n_times 3", "--n_times 3 is not supported: .*--n_times 1"),
        ("--do_test True", "--do_test True is not supported: the answers of that split"),
        ("--few_shot maybe", "--few_shot maybe: expected True or False"),
        ("--ntrain -1", "--ntrain -1: expected a whole number"),
        ("--data d --task-data-path e", "--task_data_path is another name of --data"),
        (
            "--task mmlu --task-data-path d --max-new-tokens 32",
            "--max_new_tokens 32: mmlu is answered with one token; use --max_new_tokens 1",
        ),
    ],
)
def test_what_is_not_done_is_refused_with_what_to_use(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PARSE(words.split())


def test_the_tasks_of_ascendspeed_have_its_protocol() -> None:
    """The table of flags knows no task; this is what it takes for granted."""
    with_protocol = {name for name, task in TASKS.items() if "ascend" in task.protocols}
    assert set(ASCENDSPEED_TASKS) == with_protocol
    written = {name for name in with_protocol if TASKS[name].protocols["ascend"].rule == "written"}
    assert set(ONE_TOKEN_TASKS) == written


@pytest.mark.parametrize("task", ["ceval", "cmmlu"])
def test_the_prompt_without_a_template_ends_as_the_solved_examples_do(
    task: str, benchmark: Callable
) -> None:
    test = benchmark(task, protocol="chinese_alpaca_plain", n_shots=1, max_length=10_000)
    prompt = test.example_prompt
    assert prompt.startswith("以下是中国关于anatomy考试的单项选择题，请选出其中的正确答案。\n\n")
    assert prompt.endswith("\n答案：")
    assert prompt.count("\n答案：") == 2
    assert "INST" not in prompt
