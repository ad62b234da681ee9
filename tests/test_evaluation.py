"""Scores: likelihoods are transformers' own, and neither batches, sharing, ranks nor interruptions change them."""

import csv
import json
import runpy
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minillama import device
from minillama.comm import Mesh, start
from minillama.errors import UserError
from minillama.evaluation import likelihood, report, runner
from minillama.evaluation.compare_losses import compare, read_losses
from minillama.evaluation.likelihood import Batch, Query, QueryResult, plan, read
from minillama.evaluation.protocols import TASKS, find_protocol, read_questions
from minillama.evaluation.questions import Choices, Perplexity, decide
from minillama.model import Llama
from minillama.tokenizer import Tokenizer, open_tokenizer
from tests.conftest import random_model, random_tokens
from tests.peers import open_in_transformers
from tests.ranks import run_on_ranks

ROOT = Path(__file__).parents[1]
WORDS = "the cat sat on a mat twice world hello user task response chat assistant".split()


def words(seed: int, count: int) -> str:
    return " ".join(
        WORDS[i % len(WORDS)] for i in random_tokens(count, vocab_size=999, seed=seed).tolist()
    )


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files in the published layouts of MMLU, C-Eval, CMMLU and BoolQ."""
    root = tmp_path_factory.mktemp("data")
    rows = {
        name: [
            [
                words(7 * s + r, 3 + r % 5),
                *(words(100 * s + 10 * r + c, 2) for c in range(4)),
                "ABCD"[r * r % 4],
            ]
            for r in range(9)
        ]
        for s, name in enumerate(("anatomy", "astronomy", "virology"))
    }
    for name, some in rows.items():
        for folder, suffix, head in (
            ("mmlu", "_{}", None),
            ("ceval", "_{}", ["id", "question", *"ABCD", "answer"]),
            ("cmmlu", "", ["", "Question", *"ABCD", "Answer"]),
        ):
            for split, part in (
                ("dev", some[:5]),
                ("val" if folder == "ceval" else "test", some[4:]),
            ):
                path = root / folder / split / f"{name}{suffix.format(split)}.csv"
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "w", newline="", encoding="utf-8") as file:
                    csv.writer(file).writerows(
                        part if head is None else [head, *([n, *row] for n, row in enumerate(part))]
                    )
    lines = [
        {"question": words(r, 4), "title": "t", "answer": r % 3 > 0, "passage": words(r // 2, 20)}
        for r in range(10)
    ]
    (root / "dev.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(scope="session")
def model(small_tokenizer: Tokenizer) -> Llama:
    return random_model(vocab_size=small_tokenizer.size, max_seq_len=512).eval()


@pytest.fixture
def options(data: Path) -> Callable[..., Namespace]:
    """What eval.py hands over for a task, the rest as by default."""

    def make(task: str, **changes) -> Namespace:
        flags = {
            "task": task,
            "data": str(data / ("dev.jsonl" if task == "boolq" else task)),
            "protocol": "",
            "n_shots": None,
            "subjects": (),
            "limit": 0,
            "out": "",
            "compare": "",
        }
        return Namespace(**flags | changes)

    return make


def answers(model: Llama, queries: list[Query], batches: list[Batch]) -> list[QueryResult]:
    found = {
        i: reading for readings in read(model, queries, batches) for i, reading in readings.items()
    }
    return [found[i] for i in range(len(queries))]


# ── likelihoods ──

# (task, protocol, shots) -> the prompt and the choices, written out from the reference systems, not taken from tasks.toml
LETTERS = [" A", " B", " C", " D"]


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
    return (
        text
        + "\n".join(lines(shot) + f"\nAnswer: {shot['answer']}" for shot in shots)
        + "\n\n"
        + lines(q)
        + "\nAnswer:"
    )


def chinese_alpaca(q: dict, shots: list[dict]) -> str:
    history = (
        f"以下是中国关于{q['key']}考试的单项选择题，请选出其中的正确答案。\n\n" if shots else ""
    )
    for shot in shots:
        history += lines(shot) + f"\n答案：{shot['answer']}\n\n"
    return (
        "[INST] <<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\n"
        f"{history}{lines(q)}\n答案是什么？  [/INST]"
    )


def ascend_question(q: dict) -> str:
    return f"问：{lines(q)}\n答："


def ascend_ceval(q: dict, shots: list[dict]) -> str:
    header = "请从下列选择题中选择正确的选项。\n\n"
    return (
        header
        + "".join(f"{ascend_question(shot)}{shot['answer']}\n\n" for shot in shots)
        + ascend_question(q)
    )


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
    options: Callable,
    small_tokenizer: Tokenizer,
    data: Path,
) -> None:
    test = Choices(options(task, protocol=protocol, n_shots=n_shots), small_tokenizer, 10_000)
    assert test.queries
    for id, query in test.queries.items():
        question = test.questions[id]
        file = data / task / f"dev/{question['key']}_dev.csv"
        shots = read_questions(task, question["key"], file)[:n_shots] if n_shots else []
        assert query.context == [
            small_tokenizer.bos_id,
            *small_tokenizer.encode(prompt(question, shots)),
        ]


def test_default_shots_are_the_protocols(options: Callable, small_tokenizer: Tokenizer) -> None:
    shots = {
        (task, name): Choices(options(task, protocol=name), small_tokenizer, 10_000).about[
            "n_shots"
        ]
        for task in ("boolq", "mmlu", "ceval", "cmmlu")
        for name in TASKS[task]["protocols"]
    }
    assert {key for key, count in shots.items() if count == 5} == {
        ("mmlu", "hendrycks"),
        ("mmlu", "lm_eval"),
        ("mmlu", "ascend"),
        ("ceval", "ascend"),
    }
    assert set(shots.values()) == {0, 5}


@torch.inference_mode()
def log_likelihood(theirs, context: list[int], continuation: list[int]) -> float:
    """By one plain forward of transformers over one row."""
    logits = theirs(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
    return sum(logits[len(context) - 1 + j, token].item() for j, token in enumerate(continuation))


@pytest.mark.parametrize(
    ("task", "protocol", "n_shots", "limit"),
    [
        ("boolq", "ascend", 0, 8),
        ("boolq", "lm_eval", 0, 8),
        ("mmlu", "hendrycks", 1, 2),
        ("mmlu", "lm_eval", 0, 2),
        ("cmmlu", "chinese_alpaca", 0, 3),
    ],
)
def test_likelihoods_and_predictions_are_those_of_transformers_with_real_weights_and_questions(
    shared: Path, options: Callable, task: str, protocol: str, n_shots: int, limit: int
) -> None:
    """stories260K, whose 512 pieces make several tokens of " yes" and " no": rows with continuations of different lengths."""
    transformers = pytest.importorskip("transformers")
    from minillama.checkpoint.hf_format import load_model

    place = shared / "models/stories260K"
    ours, theirs = load_model(place).eval(), open_in_transformers(place)
    tokenizer = transformers.LlamaTokenizer.from_pretrained(place)
    path = shared / "eval" / task
    test = Choices(
        options(
            task,
            data=str(path / "sample_of_dev.jsonl" if task == "boolq" else path),
            protocol=protocol,
            n_shots=n_shots,
            limit=limit,
        ),
        open_tokenizer(place),
        512,
    )
    records = runner.predict(ours, test, 8, None, {"dtype": "float32"}, Mesh())
    for record in records:
        query, question = test.queries[record["id"]], test.questions[record["id"]]
        if protocol in ("hendrycks", "lm_eval") and not test.notes["prompts_cut"]:
            prompt = test.protocol.prompt(question, [])
            if not n_shots:
                assert query.context == tokenizer(prompt).input_ids
        for continuation, (name, score) in zip(
            query.continuations, record["scores"].items(), strict=False
        ):
            expected = log_likelihood(theirs, query.context, continuation)
            if test.protocol.rule != "penalised":
                assert score == pytest.approx(expected, abs=1e-4), (record["id"], name)
        if protocol == "lm_eval" and task == "boolq":
            assert any(len(continuation) > 1 for continuation in query.continuations)
            choices = [
                log_likelihood(
                    theirs,
                    query.context,
                    tokenizer(test.protocol.prompt(question, []) + text).input_ids[
                        len(tokenizer(test.protocol.prompt(question, [])).input_ids) :
                    ],
                )
                for text in (" no", " yes")
            ]
            assert record["predicted"] == ("no", "yes")[choices[1] > choices[0]]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_heads": 1}, {"n_kv_heads": 6, "tie_embeddings": True}]
)
def test_likelihoods_are_those_of_transformers_however_queries_share_and_batch(
    tiny_checkpoint: Callable, batch_size: int, changes: dict
) -> None:
    from minillama.checkpoint.hf_format import load_model

    place = tiny_checkpoint(**changes)
    ours, theirs = load_model(place).eval(), open_in_transformers(place)
    ids = random_tokens(60).tolist()
    queries = [
        Query(ids[:20] + ids[25 + n : 30 + 2 * n], [[n + 1], [7], [3]]) for n in range(5)
    ]  # single tokens behind a shared prefix
    queries += [
        Query(ids[30:45], [[5, 6, 7], [8], [9, 4]]),
        Query(ids[:20], [[5, 6], [8]]),
        Query(ids[:1], [[1], [2]]),
        Query(ids[:1], [ids[1:40]]),
        queries[0],
    ]
    for query, reading in zip(
        queries, answers(ours, queries, plan(queries, batch_size)), strict=True
    ):
        expected = [
            log_likelihood(theirs, query.context, continuation)
            for continuation in query.continuations
        ]
        assert reading.logprobs == pytest.approx(expected, abs=1e-5)
        logits = theirs(torch.tensor([query.context])).logits[0, -1]
        assert reading.logits == pytest.approx(
            [logits[c[0]].item() for c in query.continuations], abs=1e-5
        )
        assert reading.greedy == logits.argmax()


def test_scores_do_not_depend_on_batches_sharing_or_the_chunks_of_the_head(
    model: Llama, options: Callable, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for task in ("mmlu", "boolq"):
        queries = list(
            Choices(options(task, protocol="lm_eval"), small_tokenizer, 512).queries.values()
        )
        plain = [
            value
            for reading in answers(model, queries, plan(queries, 8))
            for value in reading.logprobs
        ]
        assert any(batch.prefix for batch in plan(queries, 8))
        monkeypatch.setattr(likelihood, "LOGIT_CHUNK", 3 * small_tokenizer.size)
        for batch_size in (1, 5, 100):
            unshared = list(likelihood._batches(queries, 0, list(range(len(queries))), batch_size))
            for batches in (plan(queries, batch_size), unshared, unshared[::-1]):
                assert [
                    v for r in answers(model, queries, batches) for v in r.logprobs
                ] == pytest.approx(plain, abs=1e-5)
        monkeypatch.undo()


# ── the plan ──


def test_a_common_beginning_is_computed_once_and_every_query_stands_in_one_batch() -> None:
    shots, other = list(range(100, 140)), list(range(200, 240))
    queries = [Query(shots + [n] * (3 + n), [[1], [2]]) for n in range(5)] + [
        Query([*other, n, 7], [[1], [2]]) for n in range(3)
    ]
    queries += [Query([50, 51, 52], [[1], [2]])]
    batches = plan(queries, 4)
    assert sorted(i for batch in batches for i in batch.members) == list(range(9))
    assert sorted((batch.prefix, batch.members) for batch in batches) == [
        (0, [8]),
        (40, [0, 1, 2, 3]),
        (40, [4]),
        (40, [5, 6, 7]),
    ]


def test_a_short_common_beginning_does_not_split_batches() -> None:
    queries = [Query([1, 5, *random_tokens(20 + n, seed=n).tolist()], [[1]]) for n in range(8)]
    assert [batch.prefix for batch in plan(queries, 8)] == [0]


def test_a_longer_beginning_shared_by_fewer_is_preferred_where_it_saves_more() -> None:
    header, first, second = list(range(10)), list(range(20, 50)), list(range(60, 90))
    queries = [
        Query([*header, *shots, 100 + n, 7], [[1]]) for shots in (first, second) for n in range(4)
    ]
    assert sorted((batch.prefix, batch.members) for batch in plan(queries, 8)) == [
        (40, [0, 1, 2, 3]),
        (40, [4, 5, 6, 7]),
    ]


def test_choices_of_several_tokens_share_their_question() -> None:
    queries = [Query(random_tokens(30, seed=n).tolist(), [[1, 2], [3]]) for n in range(2)]
    assert sorted((batch.prefix, batch.members, batch.cost) for batch in plan(queries, 8)) == [
        (29, [0], 4),
        (29, [1], 4),
    ]


def test_rows_of_a_batch_are_of_like_length() -> None:
    lengths = random_tokens(40, vocab_size=30, seed=3).tolist()
    queries = [Query([n + 10, *([7] * length)], [[1]]) for n, length in enumerate(lengths)]
    padded = {
        tuple(batch.members): len(batch.members) * max(queries[i].length for i in batch.members)
        for batch in plan(queries, 8)
    }
    assert sum(padded.values()) < 1.3 * sum(query.length for query in queries)
    assert {tuple(batch.members): batch.cost for batch in plan(queries, 8)} == padded


# ── rules ──


def test_the_penalised_rule_is_that_of_transformers_logits_processors(
    model: Llama, options: Callable, small_tokenizer: Tokenizer
) -> None:
    transformers = pytest.importorskip("transformers")
    test = Choices(options("cmmlu", limit=2), small_tokenizer, 10_000)
    letters = [
        [small_tokenizer.encode(before + letter)[-1] for letter in "ABCD"] for before in ("", "：")
    ]
    query = next(iter(test.queries.values()))
    assert query.continuations == [[token] for some in letters for token in some]
    for sign in (1.0, -1.0):
        logits = (
            torch.randn(1, small_tokenizer.size, generator=torch.Generator().manual_seed(0)).abs()
            * sign
        )
        expected = (
            transformers.RepetitionPenaltyLogitsProcessor(1.1)(
                torch.tensor([query.context]), logits
            )
            / 0.2
        )
        reading = QueryResult(
            [0.0] * 8, [logits[0, token].item() for some in letters for token in some], 0
        )
        predicted, scores = decide(test.protocol, small_tokenizer, query, reading)
        sums = [(expected[0, a] + expected[0, b]).item() for a, b in zip(*letters, strict=True)]
        assert list(scores.values()) == pytest.approx(sums, rel=1e-6)
        assert predicted == max(scores, key=scores.get)


class Spelling:
    """A tokenizer that decodes every id as one text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def decode(self, ids: list[int]) -> str:
        return self.text


@pytest.mark.parametrize(
    ("task", "written", "predicted"),
    [
        ("mmlu", "A", "A"),
        ("mmlu", "D.", "D"),
        ("mmlu", "Both", "B"),
        ("mmlu", "xC.", "C"),
        ("mmlu", "xC", ""),
        ("mmlu", " A", ""),
        ("mmlu", "a", ""),
        ("mmlu", "|", "|"),
        ("ceval", "A", "A"),
        ("ceval", "A.", ""),
        ("ceval", "Both", ""),
        ("ceval", "", ""),
    ],
)
def test_what_ascend_takes_for_an_answer(task: str, written: str, predicted: str) -> None:
    protocol = find_protocol(task, "ascend")[1]
    assert (
        decide(
            protocol, Spelling(written), Query([1], [[1]] * 4), QueryResult([0.0] * 4, [0.0] * 4, 5)
        )[0]
        == predicted
    )


def test_equal_scores_go_to_yes_at_ascend_and_to_no_at_lm_eval() -> None:
    for name, predicted in (("ascend", "yes"), ("lm_eval", "no")):
        protocol, tie = find_protocol("boolq", name)[1], QueryResult([-1.0] * 2, [0.0] * 2, 0)
        assert decide(protocol, Spelling(""), Query([1], [[1]] * 2), tie)[0] == predicted


def test_ascends_boolq_compares_the_tokens_of_yes_and_no(shared: Path, options: Callable) -> None:
    tokenizer = open_tokenizer(shared / "tokenizers/llama/tokenizer.model")
    query = next(
        iter(Choices(options("boolq", protocol="ascend"), tokenizer, 10_000).queries.values())
    )
    assert query.continuations == [[3869], [1939]]
    query = next(iter(Choices(options("ceval"), tokenizer, 10_000).queries.values()))
    assert query.continuations == [[319], [350], [315], [360], [29909], [29933], [29907], [29928]]
    query = next(iter(Choices(options("mmlu"), tokenizer, 10_000).queries.values()))
    assert query.continuations == [[319], [350], [315], [360]]


# ── prompts that do not fit ──


def test_shots_are_dropped_before_a_question_is_cut(
    options: Callable, small_tokenizer: Tokenizer
) -> None:
    whole = Choices(options("mmlu", protocol="lm_eval"), small_tokenizer, 10_000)
    none = Choices(options("mmlu", protocol="lm_eval", n_shots=0), small_tokenizer, 10_000)
    longest = max(query.length for query in none.queries.values()) + 100
    short = Choices(options("mmlu", protocol="lm_eval"), small_tokenizer, longest)
    assert (
        whole.notes["shots_dropped"]
        == whole.notes["prompts_cut"]
        == short.notes["prompts_cut"]
        == 0
    )
    assert 0 < short.notes["shots_dropped"] < 5 * len(short.queries)
    assert max(query.length for query in short.queries.values()) <= longest
    fewer = [
        Choices(options("mmlu", protocol="lm_eval", n_shots=n), small_tokenizer, 10_000).queries
        for n in range(6)
    ]
    for id, query in short.queries.items():  # the most of the first shots that fit
        assert query == max(
            (queries[id] for queries in fewer if queries[id].length <= longest),
            key=lambda q: q.length,
        )
    cut = Choices(options("mmlu", protocol="lm_eval"), small_tokenizer, 30)
    assert cut.notes["prompts_cut"] > 0
    for id, query in cut.queries.items():
        assert query.length <= 30 and query.context[0] == small_tokenizer.bos_id
        assert query.context[-20:] == none.queries[id].context[-20:]


# ── interruptions and ranks ──


def run(
    model: Llama, test: Choices, out: Path | None, mesh: Mesh | None = None, **settings
) -> list[dict]:
    return runner.predict(model, test, 4, out, {"dtype": "float32", **settings}, mesh or Mesh())


def test_an_interrupted_run_goes_on_and_its_file_is_that_of_an_uninterrupted_one(
    model: Llama,
    options: Callable,
    small_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    test = Choices(options("mmlu"), small_tokenizer, 512)
    whole = run(model, test, tmp_path / "whole")
    expected = (tmp_path / "whole/predictions.jsonl").read_bytes()
    assert [json.loads(line) for line in expected.splitlines()] == whole == run(model, test, None)

    computed = []

    def stopping(*arguments):
        for number, readings in enumerate(read(*arguments)):
            if number == 2:
                raise KeyboardInterrupt
            computed.extend(readings)
            yield readings

    monkeypatch.setattr(runner, "read", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(model, test, tmp_path / "stopped")
    kept = (tmp_path / "stopped/predictions.jsonl").read_text().splitlines()
    assert len(kept) == len(computed) > 0
    with open(tmp_path / "stopped/predictions.jsonl", "a") as file:
        file.write('{"id": "anatomy/0", "sub')  # the line a crash cut short

    def counting(*arguments):
        for readings in read(*arguments):
            computed.extend(readings)
            yield readings

    monkeypatch.setattr(runner, "read", counting)
    assert run(model, test, tmp_path / "stopped") == whole
    assert (tmp_path / "stopped/predictions.jsonl").read_bytes() == expected
    assert sorted(computed) == list(range(len(whole)))  # nothing twice
    run(model, test, tmp_path / "stopped")
    assert len(computed) == len(whole)


def test_predictions_of_other_settings_are_refused(
    model: Llama, options: Callable, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    test = Choices(options("mmlu", limit=1), small_tokenizer, 512)
    run(model, test, tmp_path, n_shots=5)
    with pytest.raises(UserError, match="n_shots = 5, now it is 0"):
        run(model, test, tmp_path, n_shots=0)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(UserError, match="dtype = None"):
        run(model, test, tmp_path, n_shots=5)


def test_another_model_is_told_by_its_weights(small_tokenizer: Tokenizer) -> None:
    assert (
        runner.weights_checksum(random_model(0))
        == runner.weights_checksum(random_model(0))
        != runner.weights_checksum(random_model(1))
    )


def test_two_ranks_share_the_questions_and_write_the_file_of_one(
    model: Llama, options: Callable, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    test = Choices(options("mmlu"), small_tokenizer, 512)
    run(model, test, tmp_path / "one")

    def both() -> tuple[int, list]:
        computed = []

        def counting(*arguments):
            for readings in read(*arguments):
                computed.extend(readings)
                yield readings

        runner.read = counting
        torch.set_num_threads(1)
        with start("cpu") as mesh:
            return computed, run(model, test, tmp_path / "two", mesh)

    (first, records), (second, same) = run_on_ranks(2, both)
    assert records == same
    assert sorted(first + second) == list(range(len(records))) and min(len(first), len(second)) > 0
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "predictions.jsonl",
        "settings.json",
    ]
    assert (tmp_path / "two/predictions.jsonl").read_bytes() == (
        tmp_path / "one/predictions.jsonl"
    ).read_bytes()


def test_scores_that_are_not_finite_stop_the_run(
    options: Callable, small_tokenizer: Tokenizer
) -> None:
    broken = random_model(vocab_size=small_tokenizer.size, max_seq_len=512)
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"boolq/\d+: its scores are .*nan"):
        run(broken, Choices(options("boolq"), small_tokenizer, 512), None)


# ── tables ──


def records(subject: str, right: int, wrong: int) -> list[dict]:
    return [
        {
            "subject": subject,
            "gold": "A" if i % 4 else "B",
            "predicted": ("A" if i % 4 else "B") if i < right else "C",
            "scores": {"A": 0.0, "B": -1.0},
        }
        for i in range(right + wrong)
    ]


def test_a_table_worked_by_hand() -> None:
    summary = report.summarise(
        records("anatomy", 3, 1) + records("astronomy", 6, 10),
        {"STEM": "astronomy", "Other": "anatomy", "None": "law"},
        {"anatomy": "a" * 64, "astronomy": "b" * 64},
    )
    assert summary["n"] == 20 and summary["accuracy"] == 9 / 20 and summary["majority"] == 15 / 20
    assert summary["stderr"] == pytest.approx((0.45 * 0.55 / 20) ** 0.5)
    assert summary["unweighted"]["accuracy"] == (3 / 4 + 6 / 16) / 2
    assert summary["subjects"]["anatomy"] == {
        "n": 4,
        "accuracy": 0.75,
        "stderr": (0.75 * 0.25 / 4) ** 0.5,
        "majority": 0.75,
        "sha256": "a" * 64,
    }
    assert (
        summary["groups"].keys() == {"STEM", "Other"}
        and summary["groups"]["STEM"]["accuracy"] == 6 / 16
    )
    printed = report.table(
        summary | {"max_length": 9, "shots_dropped": 2, "prompts_cut": 1}
    ).splitlines()
    assert [line.split()[0] for line in printed[1:7]] == [
        "anatomy",
        "astronomy",
        "STEM",
        "Other",
        "total",
        "unweighted",
    ]
    assert printed[1].split() == ["anatomy", "4", "75.00%", "21.65%", "75.00%", "a" * 12]
    assert "2 shots dropped, 1 prompts cut" in printed[7]


@pytest.mark.parametrize(("right", "warned"), [(75, True), (68, True), (60, False), (95, False)])
def test_a_score_near_the_baseline_is_warned_about(right: int, warned: bool) -> None:
    """Of 100 answers 75 are A; two standard errors are some 9 %."""
    summary = report.summarise(records("anatomy", right, 100 - right), {}, {"anatomy": ""})
    assert (
        "warning" in report.table(summary | {"max_length": 9, "shots_dropped": 0, "prompts_cut": 0})
    ) == warned


def test_compared_subjects_are_in_order_of_their_difference() -> None:
    def summary(*right: int) -> dict:
        some = [
            r
            for name, n in zip(("anatomy", "astronomy", "virology"), right, strict=True)
            for r in records(name, n, 10 - n)
        ]
        return report.summarise(
            some, {}, dict.fromkeys(("anatomy", "astronomy", "virology"), "")
        ) | {"max_length": 9, "shots_dropped": 0, "prompts_cut": 0}

    printed = [
        line.split() for line in report.table(summary(5, 9, 5), summary(4, 5, 8)).splitlines()
    ]
    assert printed[0][-3:-1] == ["reference", "difference"]
    assert [(line[0], *line[5:7]) for line in printed[1:4]] == [
        ("astronomy", "50.00%", "+40.00%"),
        ("virology", "80.00%", "-30.00%"),
        ("anatomy", "40.00%", "+10.00%"),
    ]
    assert printed[4][0] == "total" and printed[4][-1] == "+6.67%"


@pytest.mark.parametrize(
    ("task", "sizes"),
    [("mmlu", [18, 13, 12, 14]), ("ceval", [20, 10, 11, 11]), ("cmmlu", [17, 11, 13, 11, 15])],
)
def test_groups_are_the_published_ones_and_no_subject_is_in_two(
    task: str, sizes: list[int]
) -> None:
    groups = [names.split() for names in TASKS[task]["groups"].values()]
    assert [len(group) for group in groups] == sizes
    assert len({name for group in groups for name in group}) == sum(sizes)


# ── files ──


@pytest.mark.parametrize(
    ("task", "name", "text", "said"),
    [
        (
            "boolq",
            "dev.jsonl",
            '{"question": "q", "passage": "", "answer": true}\n\n{"question": "q"}\n',
            r"line 3\).*malformed",
        ),
        (
            "boolq",
            "dev.jsonl",
            '{"question": "q", "passage": "p", "answer": "maybe"}\n',
            r"line 1\).*maybe",
        ),
        ("boolq", "dev.jsonl", '{"question": "q"\n', r"line 1\): malformed: not valid JSON"),
        ("boolq", "dev.jsonl", "{}\n", r"line 1\): malformed"),
        ("boolq", "dev.jsonl", "\n", "holds no records"),
        (
            "mmlu",
            "test/law_test.csv",
            "q,a,b,c,d,A\nq,a,b,c,A\n",
            "line 2: malformed: .*expected DIR/test",
        ),
        ("mmlu", "test/law_test.csv", '"q\nq",a,b,c,d,A\nq,a,b,c,d,E\n', "line 3: malformed: .*E"),
        ("ceval", "val/law_val.csv", "id,question,A,B,C,D\n0,q,a,b,c,d\n", "line 2: malformed"),
        (
            "cmmlu",
            "test/law.csv",
            ",Question,A,B,C,D,Answer\n0,q,a,b,c,d,A\n1,q,a,b,c,d\n",
            "line 3",
        ),
        ("mmlu", "test/law_test.csv", 'q,a,b,c,d,A\n"q,a\n', "line [23]: not CSV"),
        ("mmlu", "test/law_test.csv", "\n", "holds no questions"),
        ("mmlu", "elsewhere.csv", "", "no questions there; --task mmlu reads .*hendrycks"),
    ],
)
def test_a_malformed_row_is_an_error_with_file_and_line(
    task: str,
    name: str,
    text: str,
    said: str,
    tmp_path: Path,
    options: Callable,
    small_tokenizer: Tokenizer,
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"(?s)(?:{Path(name).name}|{tmp_path.name}).*{said}"):
        Choices(options(task, data=str(tmp_path), n_shots=0), small_tokenizer, 512)


def test_fields_with_line_breaks_quotes_and_rare_separators_are_read_whole(tmp_path: Path) -> None:
    question = 'one\u2028"two"\nthree, four'
    with open(tmp_path / "x.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerow([question, "", "b", "c", "d", "A"])
    assert read_questions("mmlu", "x", tmp_path / "x.csv")[0]["question"] == question
    line = {"question": question, "passage": "p\x85p", "answer": False}
    (tmp_path / "x.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_questions("boolq", "boolq", tmp_path / "x.jsonl")[0]["question"] == question


def test_subjects_and_limit_choose_questions(options: Callable, small_tokenizer: Tokenizer) -> None:
    assert list(
        Choices(options("mmlu", subjects=("virology",), limit=2), small_tokenizer, 512).queries
    ) == ["virology/0", "virology/1"]
    with pytest.raises(UserError, match="did you mean 'anatomy'"):
        Choices(options("mmlu", subjects=("anatmy",)), small_tokenizer, 512)
    with pytest.raises(UserError, match="5 solved examples there; use --n_shots 5, not 6"):
        Choices(options("mmlu", n_shots=6), small_tokenizer, 512)
    with pytest.raises(UserError, match=r"0 solved examples there; use --n_shots 0, not 1"):
        Choices(options("boolq", n_shots=1), small_tokenizer, 512)


# ── perplexity ──


@pytest.mark.parametrize("context", [16, 64, 1000])
def test_perplexity_is_transformers_loss_over_windows_that_predict_each_token_once(
    tmp_path: Path,
    small_tokenizer: Tokenizer,
    context: int,
    tiny_checkpoint: Callable,
    options: Callable,
) -> None:
    from minillama.checkpoint.hf_format import load_model

    place = tiny_checkpoint(vocab_size=small_tokenizer.size, max_seq_len=1000)
    text = words(1, 150)
    (tmp_path / "text.txt").write_text(text)
    test = Perplexity(
        options("perplexity", data=str(tmp_path / "text.txt")), small_tokenizer, context
    )
    summary = test.summarise(run(load_model(place).eval(), test, None))
    ids = [small_tokenizer.bos_id, *small_tokenizer.encode(text)]
    theirs, total = open_in_transformers(place), 0.0
    for start_ in range(0, len(ids) - 1, context):
        end = min(start_ + context, len(ids) - 1)
        row = torch.tensor([ids[max(0, end - context) : end + 1]])
        with torch.inference_mode():
            losses = torch.nn.functional.cross_entropy(
                theirs(row[:, :-1]).logits[0], row[0, 1:], reduction="none"
            )
        total += losses[-(end - start_) :].sum().item()
    assert summary["n"] == len(ids) - 1
    assert summary["loss"] == pytest.approx(total / summary["n"], rel=1e-5)
    assert summary["bits_per_byte"] == pytest.approx(
        total / len(text) / 0.6931471805599453, rel=1e-5
    )


def test_documents_of_a_jsonl_file_do_not_see_each_other(
    tmp_path: Path, small_tokenizer: Tokenizer, options: Callable
) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "the cat"}\n{"text": "the mat"}\n')
    test = Perplexity(options("perplexity", data=str(tmp_path / "t.jsonl")), small_tokenizer, 512)
    assert [query.context for query in test.queries.values()] == [[small_tokenizer.bos_id]] * 2
    (tmp_path / "t.jsonl").write_text('{"text": "the cat"}\n{"txt": "the mat"}\n')
    with pytest.raises(UserError, match=r"line 2\): lacks the string"):
        Perplexity(options("perplexity", data=str(tmp_path / "t.jsonl")), small_tokenizer, 512)
    (tmp_path / "t.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="its texts are empty"):
        Perplexity(options("perplexity", data=str(tmp_path / "t.jsonl")), small_tokenizer, 512)


# ── losses ──


def metrics(path: Path, losses: dict[int, float | None]) -> Path:
    records = [
        *({"step": step, "loss": loss} for step, loss in losses.items()),
        {"step": 9, "eval_loss": 1},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_loss_errors_worked_by_hand() -> None:
    result = compare({1: None, 2: 2.2, 3: 0.9, 4: 1.0, 5: 3.0}, {1: None, 2: 2.0, 3: 1.0, 4: 1.0})
    assert result["n"] == 3 and result["only_in_one"] == 1
    assert result["mean_relative"] == pytest.approx(0.0, abs=1e-9)  # +10 % and -10 % cancel
    assert result["max_relative"] == pytest.approx(0.1)
    assert result["mean_absolute"] == pytest.approx(0.1)
    assert result["passed"] == {"mean_relative": True, "mean_absolute": False}
    assert compare({2: 0.103}, {2: 0.1})["passed"] == {
        "mean_relative": False,
        "mean_absolute": True,
    }
    assert compare({2: 0.097}, {2: 0.1})["passed"] == {
        "mean_relative": False,
        "mean_absolute": True,
    }


def test_a_run_compared_with_itself_differs_by_nothing(
    main: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = str(metrics(tmp_path / "a.jsonl", {1: 2.0, 2: 1.0}))
    main(["--task", "loss", "--data", file, "--compare", file])
    assert "2 steps in both runs, 0 in only one" in capsys.readouterr().out


def test_runs_that_differ_too_much_fail_the_command(
    main: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = [
        str(metrics(tmp_path / name, losses))
        for name, losses in (("a.jsonl", {1: 2.0, 2: 1.1}), ("b.jsonl", {1: 2.0, 2: 1.0}))
    ]
    with pytest.raises(SystemExit) as end:
        main(["--task", "loss", "--data", files[0], "--compare", files[1]])
    assert end.value.code == 1 and "FAIL" in capsys.readouterr().out


def test_losses_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step 2: the reference's loss is 0"):
        compare({1: 1.0, 2: 1.0}, {1: 1.0, 2: 0.0})
    (tmp_path / "text.jsonl").write_text('{"step": 1, "loss": "low"}\n')
    with pytest.raises(UserError, match=r"text\.jsonl: a value is wrong"):
        read_losses(tmp_path / "text.jsonl")
    assert read_losses(metrics(tmp_path / "a.jsonl", {1: None, 2: 2.0})) == {1: None, 2: 2.0}
    with pytest.raises(UserError, match=r"step 1: .*only one"):
        compare({1: None, 2: 2.0}, {1: 1.0, 2: 2.0})
    with pytest.raises(UserError, match="no step with a loss in common"):
        compare({1: None, 2: 2.0}, {7: 1.0})
    (tmp_path / "d.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(UserError, match=r"d\.jsonl: key 'step' is missing"):
        read_losses(tmp_path / "d.jsonl")


# ── the command ──


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], None]:
    return runpy.run_path(str(ROOT / "eval.py"))["main"]


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable, small_tokenizer: Tokenizer) -> Path:
    place = tiny_checkpoint(vocab_size=small_tokenizer.size, max_seq_len=512)
    (place / "tokenizer.model").write_bytes(small_tokenizer.path.read_bytes())
    return place


def test_a_score_stands_beside_all_that_it_depends_on(
    main: Callable, checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import hashlib

    main(
        [
            "--task",
            "boolq",
            "--ckpt",
            str(checkpoint),
            "--data",
            str(data / "dev.jsonl"),
            "--out",
            str(tmp_path / "out"),
        ]
    )
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert {
        key: summary[key] for key in ("task", "protocol", "n_shots", "bos", "split", "n", "model")
    } == {
        "task": "boolq",
        "protocol": "ascend",
        "n_shots": 0,
        "bos": True,
        "split": "dev",
        "n": 10,
        "model": str(checkpoint),
    }
    assert summary["data_sha256"] == hashlib.sha256((data / "dev.jsonl").read_bytes()).hexdigest()
    assert (
        summary["example_prompt"].endswith("?\nAnswer:")
        and summary["majority"] == 0.6
        and "seconds" in summary
    )
    lines = [
        json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    ]
    assert [line["id"] for line in lines] == [f"boolq/{i}" for i in range(10)]
    assert lines[0].keys() == {"id", "subject", "gold", "predicted", "scores"}
    assert summary["accuracy"] == sum(line["gold"] == line["predicted"] for line in lines) / 10
    assert "protocol ascend, 0 shots, a begin token, split dev" in capsys.readouterr().out
    main(
        [
            "--task",
            "boolq",
            "--ckpt",
            str(checkpoint),
            "--data",
            str(data / "dev.jsonl"),
            "--compare",
            str(tmp_path / "out/summary.json"),
        ]
    )
    assert "+0.00%" in capsys.readouterr().out
    (tmp_path / "other.json").write_text('{"task": "boolq"}')
    with pytest.raises(UserError, match=r"other\.json: key 'accuracy' is missing"):
        main(
            [
                "--task",
                "boolq",
                "--ckpt",
                str(checkpoint),
                "--data",
                str(data / "dev.jsonl"),
                "--compare",
                str(tmp_path / "other.json"),
            ]
        )
    with pytest.raises(UserError, match="protocol = 'ascend', now it is 'lm_eval'"):
        main(
            [
                "--task",
                "boolq",
                "--ckpt",
                str(checkpoint),
                "--data",
                str(data / "dev.jsonl"),
                "--out",
                str(tmp_path / "out"),
                "--protocol",
                "lm_eval",
            ]
        )


def test_a_rank_loads_the_model_onto_its_own_chip_and_no_other(
    main: Callable, checkpoint: Path, data: Path, monkeypatch
) -> None:
    picked = []
    monkeypatch.setattr(
        device, "pick", lambda name, local_rank=0: picked.append(local_rank) or torch.device("cpu")
    )
    monkeypatch.setenv("LOCAL_RANK", "3")
    main(["--task", "boolq", "--ckpt", str(checkpoint), "--data", str(data / "dev.jsonl")])
    assert picked == [3]


def test_an_adapter_is_scored_as_its_merged_model(
    main: Callable, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    from minillama.checkpoint.hf_format import load_model
    from minillama.lora import LoraConfig, add_lora, merge_lora, save_adapter

    config, model = LoraConfig(rank=2), load_model(checkpoint)
    add_lora(model, config, torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    save_adapter(model, config, tmp_path / "adapter", str(checkpoint))
    merge_lora(model)
    test = Choices(
        Namespace(
            task="mmlu", data=str(data / "mmlu"), protocol="", n_shots=None, subjects=(), limit=0
        ),
        open_tokenizer(checkpoint),
        512,
    )
    expected = {record["id"]: record["scores"] for record in run(model.eval(), test, None)}
    command = ["--task", "mmlu", "--data", str(data / "mmlu"), "--out"]
    main(
        [
            *command,
            str(tmp_path / "a"),
            "--ckpt",
            str(checkpoint),
            "--lora",
            str(tmp_path / "adapter"),
        ]
    )
    main([*command, str(tmp_path / "b"), "--ckpt", str(tmp_path / "adapter")])
    main([*command, str(tmp_path / "c"), "--ckpt", str(checkpoint)])
    a, b, c = (
        [
            json.loads(line)
            for line in (tmp_path / f"{name}/predictions.jsonl").read_text().splitlines()
        ]
        for name in "abc"
    )
    assert a == b != c
    for record in a:
        assert record["scores"] == pytest.approx(expected[record["id"]], abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--task", "boolq"],
            r"--ckpt and --data missing; type: python eval.py --task boolq --ckpt LLAMA_DIR --data boolq/dev.jsonl; "
            r"boolq is published at https://github.com/google-research-datasets/boolean-questions$",
        ),
        (["--task", "mmlu", "--ckpt", "x"], "^--data missing; .*hendrycks/test$"),
        (["--task", "loss"], "--data and --compare missing"),
        (["--task", "demo"], "--ckpt missing; .*--ckpt runs/demo"),
        (["--task", "bolq"], "did you mean 'boolq'"),
        ([], "--task NAME is missing"),
        (
            ["--task", "boolq", "--ckpt", "x", "--data", "y", "--batch_size", "0"],
            "--batch_size 0: must be at least 1",
        ),
        (
            ["--task", "boolq", "--ckpt", "x", "--data", "y", "--limit", "-1"],
            "--limit -1: must be at least 0",
        ),
        (
            ["--task", "perplexity", "--ckpt", "x", "--data", "y", "--n_shots", "5"],
            "--n_shots has no meaning for --task perplexity",
        ),
        (["--task", "demo", "--ckpt", "x", "--data", "y"], "--data has no meaning for --task demo"),
    ],
)
def test_what_is_missing_is_said_with_the_command_to_type(
    main: Callable, arguments: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        main(arguments)


def test_a_protocol_or_length_that_does_not_exist_is_refused(
    main: Callable, checkpoint: Path, data: Path
) -> None:
    command = ["--task", "boolq", "--ckpt", str(checkpoint), "--data", str(data / "dev.jsonl")]
    with pytest.raises(UserError, match=r"boolq has no protocol 'ascent' .did you mean 'ascend'"):
        main([*command, "--protocol", "ascent"])
    with pytest.raises(UserError, match="perplexity has no protocol 'ascend'; protocols: rolling"):
        main(["--task", "perplexity", *command[2:], "--protocol", "ascend"])
    with pytest.raises(
        UserError, match="--max_length 513: must be from 2 to the model's context of 512 tokens"
    ):
        main([*command, "--max_length", "513"])


def test_a_summary_of_another_task_is_refused_before_anything_is_computed(
    main: Callable, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "summary.json").write_text('{"task": "mmlu", "accuracy": 0.5}')
    with pytest.raises(UserError, match="not a summary of --task boolq, but of 'mmlu'"):
        main(
            [
                "--task",
                "boolq",
                "--ckpt",
                str(checkpoint),
                "--data",
                str(data / "dev.jsonl"),
                "--compare",
                str(tmp_path / "summary.json"),
            ]
        )


def test_a_damaged_line_among_finished_predictions_is_named(
    main: Callable, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    command = [
        "--task",
        "boolq",
        "--ckpt",
        str(checkpoint),
        "--data",
        str(data / "dev.jsonl"),
        "--out",
        str(tmp_path / "out"),
    ]
    main(command)
    with open(tmp_path / "out/predictions.jsonl", "a", encoding="utf-8") as file:
        file.write("junk\n")
    with pytest.raises(UserError, match="out: a value is wrong"):
        main(command)


def test_list_tasks_prints_every_layout(main: Callable, capsys: pytest.CaptureFixture) -> None:
    main(["--list_tasks"])
    printed = capsys.readouterr().out
    assert all(name in printed and task["layout"] in printed for name, task in TASKS.items())


def test_the_losses_of_two_runs_are_compared_and_drawn(
    main: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    a, b = (
        metrics(tmp_path / "a.jsonl", {1: 2.001, 2: 1.0}),
        metrics(tmp_path / "b.jsonl", {1: 2.0, 2: 1.0}),
    )
    main(["--task", "loss", "--data", str(a), "--compare", str(b), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert printed.count("pass") == 2 and "FAIL" not in printed
    assert (tmp_path / "out/loss.png").stat().st_size > 1000
    assert json.loads((tmp_path / "out/summary.json").read_text())[
        "mean_absolute"
    ] == pytest.approx(0.0005)
