"""A chat template in a checkpoint's files: read, used by every command, and stored with what is
trained.
"""

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

import minillama
from minillama.checkpoint.template_files import read_template, resolve_template
from minillama.errors import UserError
from minillama.generation.loading import LoadOptions, load_engine
from tests.runs import new_trainer, small_run

ROOT = Path(__file__).parents[1]
OWN = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
OTHER = OWN.replace("assistant:", "assistant: ")
QUESTION = [{"role": "user", "content": "say 1"}]


def write_config(directory: Path, chat_template: Any) -> None:
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"chat_template": chat_template}))


@pytest.fixture
def instruct(inputs: Path, tmp_path: Path) -> Path:
    """A folder with the files of `write_inputs`, whose base has a chat template of its own."""
    folder = tmp_path / "inputs"
    shutil.copytree(inputs, folder)
    write_config(folder / "base", OWN)
    return folder


def run_script(name: str, *arguments: str) -> None:
    runpy.run_path(str(ROOT / f"{name}.py"))["main"](list(arguments))


@pytest.mark.parametrize(
    ("chat_template", "jinja_file", "expected"),
    [
        (OWN, "", OWN),
        ([{"name": "tool_use", "template": OTHER}, {"name": "default", "template": OWN}], "", OWN),
        (OTHER, OWN, OWN),
        (None, OWN, OWN),
        (None, "", ""),
        ("", "", ""),
    ],
)
def test_a_chat_template_is_read_where_transformers_reads_it(
    chat_template: Any, jinja_file: str, expected: str, instruct: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    base = instruct / "base"
    write_config(base, chat_template)
    if jinja_file:
        (base / "chat_template.jinja").write_text(jinja_file)
    assert read_template(base) == expected
    reference = transformers.LlamaTokenizer.from_pretrained(base)
    if expected:
        assert reference.get_chat_template() == expected
    (base / "minillama.json").write_text('{"template": "alpaca"}')
    assert read_template(base) == "alpaca"  # what the model was tuned with here comes first


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (5, "tokenizer_config.json: chat_template is int, expected a text"),
        ("hello", "chat_template = 'hello': no Jinja in it"),
        ([{"name": "tool_use", "template": OWN}], "chat_template has tool_use and no default"),
        ([{"template": OWN}], "key 'name' is missing"),
        ([5], "wrong type"),
    ],
)
def test_a_chat_template_of_another_kind_is_refused(
    chat_template: Any, message: str, instruct: Path
) -> None:
    write_config(instruct / "base", chat_template)
    with pytest.raises(UserError, match=message):
        read_template(instruct / "base")


def test_a_jinja_file_may_be_named(instruct: Path) -> None:
    file = instruct / "mine.jinja"
    file.write_text(OWN)
    assert resolve_template(str(file)) == OWN
    file.write_text("vicuna_v1.1")
    with pytest.raises(UserError, match=r"mine\.jinja: holds no chat template in Jinja"):
        resolve_template(str(file))
    with pytest.raises(UserError, match=r"missing\.jinja: no such file"):
        resolve_template("missing.jinja")
    with pytest.raises(UserError, match=r"no template 'zephir' \(did you mean 'zephyr'\?\).*jinja"):
        resolve_template("zephir")


def test_a_chat_and_a_prompt_are_those_of_transformers(instruct: Path, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    base = instruct / "base"
    reference = transformers.LlamaTokenizer.from_pretrained(base)
    engine = load_engine(LoadOptions(str(base), device="cpu"))
    ids = reference.apply_chat_template(QUESTION, add_generation_prompt=True)
    assert engine.encode_prompt("say 1") == ids
    assert minillama.load(base, device="cpu").template.startswith("Jinja text (sha256 ")
    output = instruct / "a.jsonl"
    words = ["--greedy", "--max_new_tokens", "2", "--prompt", "say 1", "--device", "cpu"]
    run_script("generate", "--ckpt", str(base), *words, "--output", str(output))
    assert json.loads(output.read_text())["prompt_ids"] == ids
    assert "(template: Jinja text (sha256 " in capsys.readouterr().err


def test_a_template_whose_answers_have_no_end_is_told(instruct: Path, capsys) -> None:
    write_config(instruct / "base", OWN.replace("eos_token", "'<|im_end|>'"))
    words = ["--greedy", "--max_new_tokens", "2", "--prompt", "say 1", "--device", "cpu"]
    run_script("generate", "--ckpt", str(instruct / "base"), *words)
    assert "note: the chat template writes no control token" in capsys.readouterr().err


def test_an_adapter_without_a_template_takes_that_of_its_base(instruct: Path) -> None:
    config = small_run(instruct, instruct / "run", template="", max_steps=1, lora=True)
    new_trainer(config).train()
    adapter = instruct / "run/final"
    for name in ("minillama.json", "chat_template.jinja", "tokenizer_config.json", "manifest.json"):
        (adapter / name).unlink()
    options = LoadOptions(str(adapter), base=str(instruct / "base"), device="cpu")
    assert load_engine(options).template == OWN


def test_a_run_trains_in_the_bases_template_and_stores_it(instruct: Path, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    config = small_run(instruct, instruct / "run", template="", max_steps=1)
    new_trainer(config).train()
    assert "template: Jinja text (sha256 " in capsys.readouterr().out
    final = instruct / "run/final"
    assert json.loads((final / "minillama.json").read_text())["template"] == "chat_template.jinja"
    assert (final / "chat_template.jinja").read_text() == OWN
    assert transformers.LlamaTokenizer.from_pretrained(final).get_chat_template() == OWN
    assert load_engine(LoadOptions(config.out_dir, device="cpu")).template == OWN


def test_a_run_takes_a_jinja_file_before_the_bases_template(instruct: Path) -> None:
    (instruct / "mine.jinja").write_text(OTHER)
    template = str(instruct / "mine.jinja")
    config = small_run(instruct, instruct / "run", template=template, max_steps=1, lora=True)
    trainer = new_trainer(config)
    trainer.train()
    final = instruct / "run/final"
    assert trainer.run.template == OTHER
    assert (final / "chat_template.jinja").read_text() == OTHER
    assert load_engine(LoadOptions(config.out_dir, device="cpu")).template == OTHER
    for name in ("tokenizer.model", "manifest.json"):  # an adapter may have no tokenizer
        (final / name).unlink()
    merged = instruct / "merged"
    words = ["--base", str(instruct / "base"), "--lora", str(final), "--output", str(merged)]
    run_script("convert", "merge-lora", *words)
    assert read_template(merged) == OTHER


def test_a_data_set_is_made_in_the_tokenizers_template(instruct: Path, capsys) -> None:
    """So a data set made beforehand is the one that a run on the raw file makes."""
    words = ["--input", str(instruct / "alpaca.json"), "--output", str(instruct / "set")]
    run_script("convert", "data", *words, "--tokenizer", str(instruct / "base"), "--workers", "2")
    assert json.loads((instruct / "set.json").read_text())["template"] == OWN
    made = new_trainer(small_run(instruct, instruct / "run", template=""))
    config = small_run(instruct, instruct / "again", template="", data=(str(instruct / "set"),))
    opened = new_trainer(config)
    assert made.run.inputs.fingerprints["data"] == opened.run.inputs.fingerprints["data"]
    (instruct / "mine.jinja").write_text(OTHER)
    with pytest.raises(
        UserError, match=r"was made with the template Jinja text .*, not Jinja text"
    ):
        new_trainer(
            small_run(
                instruct,
                instruct / "third",
                template=str(instruct / "mine.jinja"),
                data=(str(instruct / "set"),),
            )
        )


def test_a_generation_prompt_of_another_kind_is_warned_of(instruct: Path, capsys) -> None:
    write_config(instruct / "base", OWN.replace("%}assistant:", "%}assistant: <think>"))
    words = ["--input", str(instruct / "alpaca.json"), "--output", str(instruct / "set")]
    run_script("convert", "data", *words, "--tokenizer", str(instruct / "base"))
    assert "warning: the chat template writes '<think>' before" in capsys.readouterr().err
