"""eval.py --template: a prompt as the message of a user, a choice as the answer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from minillama.chat import Conversation, Turn
from minillama.comm import Mesh
from minillama.data.encode import encode_document
from minillama.errors import UserError
from minillama.evaluation import runner
from minillama.evaluation.multiple_choice import MultipleChoice
from minillama.evaluation.options import EvalOptions, check
from minillama.generation.config import GenerationConfig
from minillama.generation.engine import Engine
from minillama.model import Llama
from minillama.tokenizer import Tokenizer

JINJA = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("template", ["llama2", "zephyr", "llama_factory_default", "own.jinja"])
def test_a_query_is_the_beginning_of_a_training_example(
    options: Callable, small_tokenizer: Tokenizer, tmp_path: Path, template: str
) -> None:
    text = template
    if template == "own.jinja":
        text = JINJA
        (tmp_path / template).write_text(JINJA)
        template = str(tmp_path / template)
    wrapped = MultipleChoice(options("mmlu", template=template), small_tokenizer, 512)
    plain = MultipleChoice(options("mmlu"), small_tokenizer, 512)
    id, query = next(iter(wrapped.queries.items()))
    prompt = wrapped.example_prompt
    assert prompt == plain.example_prompt
    for letter, continuation in zip("ABCD", query.continuations, strict=True):
        document = Conversation((Turn(prompt, letter),))
        ids, mask = encode_document(small_tokenizer, document, text, append_eod=True)
        assert mask is not None
        end = len(query.context) + len(continuation)
        assert ids[:end] == query.context + continuation
        assert mask[len(query.context) : end + 1] == [1] * (len(continuation) + 1)
        assert ids[end] == small_tokenizer.eos_id  # what ends the answer is not scored
    assert query != plain.queries[id]


def test_other_rules_score_a_choice_by_itself_in_the_templates_context(
    options: Callable, small_tokenizer: Tokenizer
) -> None:
    wrapped = MultipleChoice(
        options("mmlu", template="zephyr", protocol="ascend"), small_tokenizer, 512
    )
    plain = MultipleChoice(options("mmlu", protocol="ascend"), small_tokenizer, 512)
    for id, query in wrapped.queries.items():
        assert query.continuations == plain.queries[id].continuations
        assert query.context != plain.queries[id].context


def test_a_prompt_that_is_cut_keeps_bos_where_the_template_has_one(
    options: Callable, small_tokenizer: Tokenizer
) -> None:
    for template, begins_with_bos in (("llama2", True), ("zephyr", False)):
        test = MultipleChoice(options("mmlu", template=template, n_shots=0), small_tokenizer, 30)
        whole = MultipleChoice(options("mmlu", template=template, n_shots=0), small_tokenizer, 512)
        query = next(iter(test.queries.values()))
        context = next(iter(whole.queries.values())).context
        assert query.length == 30 and test.prompts_cut > 0
        kept = [small_tokenizer.bos_id] if begins_with_bos else []
        num_tail = len(query.context) - len(kept)
        assert query.context == kept + context[-num_tail:]


def test_the_template_is_part_of_what_a_score_depends_on(
    options: Callable, model: Llama, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    engine = Engine(model, small_tokenizer, GenerationConfig(greedy=True, template="none"))
    headlines: list[str] = []

    def evaluate(**changes: str) -> EvalOptions:
        chosen = options("mmlu", limit=1, out=str(tmp_path / "out"), **changes)
        runner.evaluate(chosen, engine, Mesh(), announce=headlines.append)
        return chosen

    evaluate()
    assert "template" not in json.loads((tmp_path / "out/summary.json").read_text())
    with pytest.raises(UserError, match="template"):
        evaluate(template="zephyr")  # goes on from predictions of another template
    (tmp_path / "out/predictions.jsonl").unlink()
    (tmp_path / "out/settings.json").unlink(missing_ok=True)
    evaluate(template="zephyr")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["template"], summary["bos"]) == ("zephyr", False)
    assert "template zephyr, 5 shots, without BOS" in headlines[-1]


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("ceval", {}, "this protocol has a prompt format of its own .'.INST. <<SYS>>"),
        ("mmlu", {"template": "zephir"}, "no template 'zephir' .did you mean 'zephyr'"),
        ("mmlu", {"template": "none.jinja"}, r"none\.jinja: no such file"),
    ],
)
def test_a_template_without_a_place_is_refused(
    options: Callable, small_tokenizer: Tokenizer, task: str, changes: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        MultipleChoice(options(task, **{"template": "zephyr"} | changes), small_tokenizer, 512)


def test_tasks_without_a_prompt_refuse_a_template() -> None:
    options = EvalOptions(task="perplexity", data="a.txt", template="zephyr")
    with pytest.raises(UserError, match="--template has no meaning for --task perplexity"):
        check(options, has_model=True)
