"""Prompts: each protocol's is that of its system, and one that is too long loses shots first.

The expected prompts are written out from the reference systems, and not taken from tasks.toml.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from minillama.evaluation.protocols import TASKS
from minillama.evaluation.questions import read_questions
from minillama.tokenizer import Tokenizer


def boolq(q: dict, shots: list[dict]) -> str:
    return f"{q['passage']}\nQuestion: {q['question']}?\nAnswer:"


def lines(q: dict) -> str:
    return f"{q['question']}\nA. {q['A']}\nB. {q['B']}\nC. {q['C']}\nD. {q['D']}"


def hendrycks(q: dict, shots: list[dict]) -> str:
    text = f"The following are multiple choice questions (with answers) about  {q['subject']}.\n\n"
    for shot in shots:
        text += lines(shot) + f"\nAnswer: {shot['answer']}\n\n"
    return text + lines(q) + "\nAnswer:"


def lm_eval(q: dict, shots: list[dict]) -> str:
    return hendrycks(q, shots).replace("about  ", "about ")


def ascend(q: dict, shots: list[dict]) -> str:
    text = f"The following are multiple choice questions (with answers) about  {q['subject']}.\n"
    text += "\n".join(lines(shot) + f"\nAnswer: {shot['answer']}" for shot in shots)
    return text + "\n\n" + lines(q) + "\nAnswer:"


def chinese_alpaca(q: dict, shots: list[dict]) -> str:
    history = ""
    if shots:
        history = f"以下是中国关于{q['key']}考试的单项选择题，请选出其中的正确答案。\n\n"
    for shot in shots:
        history += lines(shot) + f"\n答案：{shot['answer']}\n\n"
    return (
        "[INST] <<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\n"
        f"{history}{lines(q)}\n答案是什么？  [/INST]"
    )


def ascend_question(q: dict) -> str:
    return f"问：{lines(q)}\n答："


def ascend_ceval(q: dict, shots: list[dict]) -> str:
    text = "请从下列选择题中选择正确的选项。\n\n"
    for shot in shots:
        text += f"{ascend_question(shot)}{shot['answer']}\n\n"
    return text + ascend_question(q)


PROMPTS = [
    ("boolq", "ascend", 0, boolq),
    ("boolq", "lm_eval", 0, boolq),
    ("mmlu", "hendrycks", 5, hendrycks),
    ("mmlu", "lm_eval", 5, lm_eval),
    ("mmlu", "lm_eval", 0, lm_eval),
    ("mmlu", "ascend", 5, ascend),
    ("ceval", "chinese_alpaca", 0, chinese_alpaca),
    ("ceval", "chinese_alpaca", 2, chinese_alpaca),
    ("ceval", "ascend", 5, ascend_ceval),
    ("mmlu", "hendrycks", 2, hendrycks),
]


@pytest.mark.parametrize(("task", "protocol", "n_shots", "prompt"), PROMPTS)
def test_a_protocols_prompt_is_that_of_its_system(
    task: str,
    protocol: str,
    n_shots: int,
    prompt: Callable,
    benchmark: Callable,
    small_tokenizer: Tokenizer,
    data: Path,
) -> None:
    test = benchmark(task, max_length=10_000, protocol=protocol, n_shots=n_shots)
    assert test.queries
    for id, query in test.queries.items():
        question = test.questions[id]
        subject = question["key"]
        shots = []
        if n_shots:
            file = data / task / f"dev/{subject}_dev.csv"
            shots = read_questions(TASKS[task], subject, file)[:n_shots]
        ids = small_tokenizer.encode(prompt(question, shots))
        assert query.context == [small_tokenizer.bos_id, *ids]


def test_default_shots_are_the_protocols(benchmark: Callable) -> None:
    shots = {}
    for task in ("boolq", "mmlu", "ceval", "cmmlu"):
        for protocol in TASKS[task].protocols:
            test = benchmark(task, max_length=10_000, protocol=protocol)
            shots[task, protocol] = test.setup.n_shots
    assert {key for key, count in shots.items() if count == 5} == {
        ("mmlu", "hendrycks"),
        ("mmlu", "lm_eval"),
        ("mmlu", "ascend"),
        ("ceval", "ascend"),
    }
    assert set(shots.values()) == {0, 5}


def test_shots_are_dropped_before_a_question_is_cut(
    benchmark: Callable, small_tokenizer: Tokenizer
) -> None:
    def mmlu(max_length: int, n_shots: int = 5):
        return benchmark("mmlu", max_length, protocol="lm_eval", n_shots=n_shots)

    whole = mmlu(10_000)
    without_shots = mmlu(10_000, n_shots=0)
    max_length = max(query.length for query in without_shots.queries.values()) + 100
    short = mmlu(max_length)
    assert whole.shots_dropped == whole.prompts_cut == short.prompts_cut == 0
    assert 0 < short.shots_dropped < 5 * len(short.queries)
    assert max(query.length for query in short.queries.values()) <= max_length

    with_shots = [mmlu(10_000, n_shots=n).queries for n in range(6)]
    for id, query in short.queries.items():  # as many of the first shots as fit
        fitting = [queries[id] for queries in with_shots if queries[id].length <= max_length]
        assert query == max(fitting, key=lambda q: q.length)

    cut = mmlu(30)
    assert cut.prompts_cut > 0
    for id, query in cut.queries.items():
        assert query.length <= 30
        assert query.context[0] == small_tokenizer.bos_id
        assert query.context[-20:] == without_shots.queries[id].context[-20:]
