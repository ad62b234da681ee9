"""The data of a run: its template, what is left out of it, and what is held out."""

import json
import shutil
from pathlib import Path

import pytest

from minillama.chat import Conversation, Turn
from minillama.checkpoint.hf_writer import save_model
from minillama.comm import Mesh
from minillama.data.encode import encode_document
from minillama.errors import UserError
from minillama.generation.loading import LoadOptions, load_engine
from minillama.tokenizer import open_tokenizer
from minillama.train_config import TrainConfig
from minillama.training.run import prepare
from minillama.training.trainer import train
from tests.conftest import random_model
from tests.datasets import build
from tests.runs import new_trainer, small_run, write_inputs

MESSAGES = [{"from": "human", "value": "say 1"}, {"from": "gpt", "value": "1"}]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """The files of `write_inputs`, and a ShareGPT file; the base has room for long templates."""
    write_inputs(tmp_path)
    tokenizer = open_tokenizer(tmp_path / "tokenizer.model")
    model = random_model(vocab_size=tokenizer.size, max_seq_len=512)
    save_model(model, tmp_path / "base", tokenizer)
    chats = [{"conversations": MESSAGES}] * 8
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    return tmp_path


def long_run(inputs: Path, directory: Path, **changes) -> TrainConfig:
    return small_run(inputs, directory, **{"max_length": 512, "template": ""} | changes)


def tune(base: Path, template: str) -> None:
    """Let a model say that it was tuned with a template."""
    (base / "minillama.json").write_text(json.dumps({"template": template}))


@pytest.mark.parametrize(
    ("named", "of_the_base", "data", "expected"),
    [
        ("", "", "chats.json", "vicuna_v1.1"),
        ("", "", "alpaca.json", "alpaca"),
        ("", "", "text.txt", ""),
        ("", "llama2", "chats.json", "llama2"),
        ("", "llama2", "text.txt", "llama2"),
        ("raw", "llama2", "alpaca.json", "raw"),
        ("raw", "", "text.txt", "raw"),
    ],
)
def test_a_run_takes_the_template_named_or_the_bases_or_the_datas(
    inputs, capsys, named, of_the_base, data, expected
):
    tune(inputs / "base", of_the_base)
    config = long_run(inputs, inputs / "run", template=named, data=(str(inputs / data),))
    run = new_trainer(config).run
    assert run.template == expected
    assert f"template: {expected or 'none'}\n" in capsys.readouterr().out
    tokens = run.train_batches.micro_batches(0)[0].tokens.tolist()
    if data == "chats.json":
        conversation = Conversation((Turn("say 1", "1", None),))
        ids, _ = encode_document(run.tokenizer, conversation, expected, append_eod=True)
        assert tokens[: len(ids)] == ids


def test_a_model_trained_on_text_gets_its_prompts_as_they_are(inputs):
    data = (str(inputs / "text.txt"),)
    config = long_run(inputs, inputs / "run", data=data, max_steps=1)
    new_trainer(config).train()
    about = json.loads((inputs / "run/final/minillama.json").read_text())
    assert about["template"] == ""
    engine = load_engine(LoadOptions(ckpt=config.out_dir, device="cpu"))
    assert engine.template == "none"
    prompt = engine.tokenizer.encode("say 1")
    assert engine.encode_prompt("say 1") == [engine.tokenizer.bos_id, *prompt]


def test_a_run_is_continued_with_its_own_template(inputs):
    """A run that an earlier version began with another default is not changed in its middle."""
    data = (str(inputs / "chats.json"),)
    settings = {"data": data, "save_strategy": "steps", "save_steps": 2}
    tune(inputs / "base", "alpaca")
    config = long_run(inputs, inputs / "run", max_steps=4, **settings)
    train(config, Mesh())
    (inputs / "run/summary.json").unlink()  # as if it was killed after its last checkpoint
    shutil.rmtree(inputs / "run/final")
    tune(inputs / "base", "")
    again = prepare(config, Mesh())
    assert again.resume_point is not None
    assert again.template == "alpaca"


def test_validation_data_is_rendered_as_the_training_data_is(inputs):
    """Raw validation data takes the template of a tokenized training set."""
    tokenizer = open_tokenizer(inputs / "tokenizer.model")
    build([inputs / "chats.json"], tokenizer, inputs / "set", template="llama2")
    config = long_run(
        inputs,
        inputs / "run",
        data=(str(inputs / "set"),),
        eval_data=(str(inputs / "chats.json"),),
    )
    run = new_trainer(config).run
    assert run.template == "llama2"
    trained = run.train_batches.micro_batches(0)[0].tokens
    held_out = run.eval_batches.micro_batches(0)[0].tokens
    length = min(len(trained), len(held_out))
    assert trained[:length].tolist() == held_out[:length].tolist()


def test_a_template_that_is_no_name_is_refused(inputs):
    (inputs / "base/minillama.json").write_text('{"template": ["alpaca"]}')
    config = long_run(inputs, inputs / "run")
    with pytest.raises(UserError, match=r"minillama\.json: template is \['alpaca'\], expected a"):
        prepare(config, Mesh())


def test_answers_cut_off_are_left_out_of_a_run_up_to_max_dropped(inputs, capsys):
    long_question = [{"from": "human", "value": "say " * 600}, {"from": "gpt", "value": "1"}]
    chats = [{"conversations": MESSAGES}] * 8 + [{"conversations": long_question}]
    (inputs / "chats.json").write_text(json.dumps(chats))
    data = (str(inputs / "chats.json"),)
    config = long_run(inputs, inputs / "run", data=data)
    with pytest.raises(UserError, match=r"1 of 9 documents .* raise max_dropped, now 0\.1"):
        new_trainer(config)
    new_trainer(long_run(inputs, inputs / "run", data=data, max_dropped=0.2))
    assert "1 left out: no target within max_length" in capsys.readouterr().out


def test_a_run_does_not_train_on_what_it_holds_out(inputs):
    run = new_trainer(long_run(inputs, inputs / "run", validation_split=0.2)).run
    trained = run.train_batches.windows.start.tolist()
    held_out = run.eval_batches.windows.start.tolist()
    assert (len(trained), len(held_out)) == (240, 60)
    assert not set(trained) & set(held_out)


def test_held_out_documents_that_are_most_of_the_text_are_warned_of(inputs, capsys):
    """The seed holds out one of two files. If that is the long one, little is left to train on."""
    texts = {"short": "the cat sat", "long": "the cat sat on the mat " * 200}
    for name, text in texts.items():
        (inputs / f"{name}.txt").write_text(text)
    warned = set()
    for seed in range(6):
        config = long_run(
            inputs,
            inputs / "run",
            data=tuple(str(inputs / f"{name}.txt") for name in texts),
            validation_split=0.4,
            seed=seed,
        )
        long_is_held_out = new_trainer(config).run.eval_batches.windows.length.sum() > 100
        printed = capsys.readouterr().out
        assert ("takes 1 of 2 documents, which hold 100% of the tokens" in printed) == (
            long_is_held_out
        )
        warned.add(long_is_held_out)
    assert warned == {True, False}
