"""minillama from Python: a model is loaded and completes prompts; nothing is imported too early."""

import ast
import doctest
import json
import subprocess
import sys
from pathlib import Path

import pytest

import minillama
from minillama import PYTHON_API, LoadedModel

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden/model"
QUESTION = "Which number is larger, 31 or 62?"
REPEAT = "Please repeat cat, dog and owl."
GREEDY = {"greedy": True, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return minillama.load(GOLDEN, template="llama_factory_default", device="cpu")


def test_a_loaded_model_has_its_module_tokenizer_and_template(model: LoadedModel) -> None:
    assert model.model.config.vocab_size >= model.tokenizer.size
    assert model.template == "llama_factory_default"
    assert minillama.load(GOLDEN, dtype="bfloat16", lora=[]).template == "none"


def test_a_prompt_gives_a_string_and_a_list_gives_a_list(model: LoadedModel) -> None:
    answer = model.generate(QUESTION, **GREEDY)
    assert answer.strip() == "62"
    assert model.generate([QUESTION, REPEAT, QUESTION], batch_size=2, **GREEDY) == [
        answer,
        model.generate(REPEAT, **GREEDY),
        answer,
    ]


def test_streamed_text_is_the_completion(model: LoadedModel) -> None:
    pieces = list(model.stream(REPEAT, **GREEDY))
    assert len(pieces) > 1
    assert "".join(pieces) == model.generate(REPEAT, **GREEDY)


def test_settings_hold_for_one_call_only(model: LoadedModel) -> None:
    assert len(model.generate(REPEAT, greedy=True, max_new_tokens=2)) < 10
    assert len(model.generate(REPEAT, greedy=True, stop=[","])) < 10
    assert model.generate(QUESTION, **GREEDY).strip() == "62"
    assert model.generate(QUESTION, template="none", **GREEDY) != model.generate(QUESTION, **GREEDY)


def test_the_same_seed_gives_the_same_sample(model: LoadedModel) -> None:
    sampling = {"temperature": 3.0, "top_p": 1.0, "max_new_tokens": 24}
    sample = model.generate(REPEAT, seed=3, **sampling)
    assert model.generate(REPEAT, seed=3, **sampling) == sample
    assert model.generate(REPEAT, seed=4, **sampling) != sample


def test_a_chat_remembers(model: LoadedModel) -> None:
    chat = model.chat(**GREEDY)
    assert chat.ask(QUESTION) == "62"
    answer = "".join(chat.reply(REPEAT))
    assert [turn.user for turn in chat.turns] == [QUESTION, REPEAT]
    assert chat.turns[1].answer == answer.strip()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: minillama.load(GOLDEN, dtpe="float32"), "'dtpe' .did you mean 'dtype'"),
        (lambda model: model.generate("a", max_tokens=3), "did you mean 'max_new_tokens'"),
        (lambda model: model.generate("a", template="alpacca"), "did you mean 'alpaca'"),
        (lambda model: list(model.stream("a", gredy=True)), "did you mean 'greedy'"),
        (lambda model: model.chat(temprature=1), "did you mean 'temperature'"),
        (lambda model: model.generate("a", num_beams=2, early_stopping="yes"), "early_stopping"),
        (lambda model: model.generate("a", num_beams=0), "num_beams 0: must be at least 1"),
        (lambda model: minillama.load("absent"), "absent"),
    ],
)
def test_mistakes_are_user_errors_that_name_the_closest(model, call, message: str) -> None:
    with pytest.raises(minillama.UserError, match=message):
        call(model)


def test_training_returns_the_summary_and_its_run_can_be_loaded(tmp_path: Path) -> None:
    records = [{"instruction": QUESTION, "output": "62"}, {"instruction": REPEAT, "output": "cat"}]
    (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")
    config = minillama.TrainConfig(
        ckpt=str(GOLDEN),
        data=(str(tmp_path / "data.json"),),
        out_dir=str(tmp_path / "run"),
        cache_dir=str(tmp_path / "cache"),
        lora=True,
        max_steps=2,
        device="cpu",
    )
    summary = minillama.train(config)
    assert summary["steps"] == 2
    assert minillama.train(config) == summary, "the run is finished"
    tuned = minillama.load(tmp_path / "run", device="cpu")
    assert tuned.template == "alpaca"
    assert isinstance(tuned.generate(QUESTION, **GREEDY), str)


def test_a_preset_takes_keys_that_change_it() -> None:
    config = minillama.preset("demo_lora", max_steps=3, lora_targets=["q_proj"])
    assert (config.max_steps, config.lora, config.lora_targets) == (3, True, ("q_proj",))
    with pytest.raises(minillama.UserError, match="did you mean 'max_steps'"):
        minillama.preset("demo", max_step=3)
    with pytest.raises(minillama.UserError, match="demo_lora"):
        minillama.preset("demo_lor")


def test_conversions_are_functions_that_return_what_the_script_prints(tmp_path: Path) -> None:
    """The difference of two models, added to its base, gives the other one again."""
    adapter = ROOT / "tests/golden/adapter"
    merged = minillama.merge_lora(GOLDEN, [adapter], tmp_path / "merged")
    assert str(tmp_path / "merged") in str(merged)
    minillama.make_delta(GOLDEN, tmp_path / "merged", tmp_path / "delta")
    written = minillama.apply_delta(GOLDEN, tmp_path / "delta", tmp_path / "restored")
    assert written.path == tmp_path / "restored"
    manifest = minillama.sha256(tmp_path / "merged")
    assert len(manifest.content) == 64


def test_metas_layout_and_back_is_the_same_model(tiny_checkpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint(tie_embeddings=False)
    content = minillama.sha256(base).content
    minillama.meta(base, tmp_path / "meta", reverse=True, shards=3)
    assert minillama.sha256(tmp_path / "meta", check=base).content == content
    minillama.meta(tmp_path / "meta", tmp_path / "back", max_seq_len=64)
    assert minillama.sha256(tmp_path / "back", check=base).content == content


def test_data_is_tokenized_from_python(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("cat, dog and owl", encoding="utf-8")
    dataset = minillama.tokenize_data([tmp_path / "text.txt"], GOLDEN, tmp_path / "set", quiet=True)
    assert (dataset.documents, dataset.prefix) == (1, tmp_path / "set")
    with pytest.raises(minillama.UserError, match="already exists"):
        minillama.tokenize_data([tmp_path / "text.txt"], GOLDEN, tmp_path / "set")


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"overwite": True}, "did you mean 'overwrite'"),
        ({"dtype": "float61"}, "no dtype 'float61'"),
        ({"shards": 2}, "shards has no meaning without"),
        ({"format": "pth"}, "must be hf or meta"),
    ],
)
def test_wrong_options_of_a_conversion_are_refused(
    keywords: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(minillama.UserError, match=message):
        minillama.merge_lora(GOLDEN, [ROOT / "tests/golden/adapter"], tmp_path / "m", **keywords)
    assert not (tmp_path / "m").exists()


def test_importing_the_package_imports_no_torch_and_sets_no_environment() -> None:
    program = (
        "import os, sys; before = dict(os.environ); import minillama; dir(minillama)\n"
        "assert dict(os.environ) == before\n"
        "heavy = {'torch', 'numpy', 'sentencepiece', 'tqdm'} & set(sys.modules)\n"
        "parts = [name for name in sys.modules if name.startswith('minillama.')]\n"
        "assert not heavy and not parts, (heavy, parts)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=300)


def test_every_name_of_the_api_exists_and_is_known_to_type_checkers() -> None:
    tree = ast.parse((ROOT / "minillama/__init__.py").read_text(encoding="utf-8"))
    imported = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("minillama.")
        for alias in node.names
    }
    assert imported == PYTHON_API
    for name in PYTHON_API:
        assert getattr(minillama, name).__module__ == PYTHON_API[name]
        assert name in dir(minillama)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        minillama.laod  # noqa: B018
    assert (ROOT / "minillama/py.typed").is_file()


def test_the_examples_of_the_python_page_give_what_it_shows(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    page = ROOT / "docs/python.md"
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    outcome = doctest.testfile(str(page), False, optionflags=flags, encoding="utf-8")
    assert outcome.attempted > 10
    assert outcome.failed == 0
