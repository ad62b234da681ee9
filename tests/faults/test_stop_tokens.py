"""A text ends at every token that the model was taught to end with, and the export says so."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import minillama
from minillama.checkpoint.hf_reader import load_model
from minillama.checkpoint.hf_writer import save_model
from minillama.checkpoint.stop_tokens import write_stop_ids
from minillama.conversion.merge import merge_lora
from minillama.conversion.writer import Output
from minillama.generation.config import GenerationConfig
from minillama.generation.loading import LoadOptions, load_engine
from minillama.lora import LoraConfig, add_lora, save_adapter
from minillama.train_config import TrainConfig
from tests.conftest import random_model

SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
WORDS = ("red", "blue", "king", "dog")


@pytest.fixture(scope="module")
def llama3_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small tokenizer with LLaMA 3's special tokens; EOS is 1, <|eot_id|> 4."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("llama3")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(["Say red blue king dog user assistant"] * 9, trainer)
    model.save(str(folder / "tokenizer.json"))
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def eos_of(directory: Path) -> list[object]:
    """eos_token_id as the two configs have it."""
    names = ("config.json", "generation_config.json")
    return [json.loads((directory / name).read_text())["eos_token_id"] for name in names]


def test_a_model_tuned_with_llama3s_template_ends_its_answers(
    llama3_tokenizer: Path, tmp_path: Path
) -> None:
    """It learns to end with <|eot_id|>, which is not the tokenizer's EOS."""
    transformers = pytest.importorskip("transformers")
    records = [{"instruction": f"Say {word}", "output": word} for word in WORDS] * 20
    (tmp_path / "say.json").write_text(json.dumps(records))
    config = TrainConfig(
        init="scratch",
        tokenizer=str(llama3_tokenizer / "tokenizer.json"),
        dim=64,
        n_layers=2,
        n_heads=4,
        context=64,
        data=(str(tmp_path / "say.json"),),
        template="llama3",
        max_steps=60,
        learning_rate=5e-3,
        device="cpu",
        out_dir=str(tmp_path / "run"),
    )
    minillama.train(config)
    final = tmp_path / "run/final"
    assert eos_of(final) == [[1, 4], [1, 4]]
    engine = load_engine(LoadOptions(str(tmp_path / "run")), GenerationConfig(greedy=True))
    completion = engine.new_completion(engine.encode_prompt("Say king"))
    text = "".join(piece.text for piece in engine.stream([completion], None))
    assert (text, completion.finish_reason) == ("king", "eos")

    theirs = transformers.AutoModelForCausalLM.from_pretrained(final)
    prompt = torch.tensor([completion.prompt_ids])
    output = theirs.generate(prompt, do_sample=False, max_new_tokens=20, pad_token_id=0)
    assert output[0, prompt.shape[1] :].tolist() == [*completion.ids, 4]


def test_a_run_that_goes_on_from_a_checkpoint_keeps_all_that_ends_its_texts(settings_for) -> None:
    """generation_config.json of the base has a token that its config.json lacks."""
    config = settings_for(max_steps=1)
    base = Path(config.out_dir).with_name("base")
    shutil.copytree(config.ckpt, base)
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    minillama.train(replace(config, ckpt=str(base)))
    assert eos_of(Path(config.out_dir) / "final") == [[2, 7], [2, 7]]


def test_a_config_that_claims_another_eos_than_the_tokenizer_does_not_hide_it(
    tmp_path: Path, small_tokenizer
) -> None:
    """config.json says 1, which is BOS; the tokenizer's EOS is 2."""
    model = random_model(vocab_size=400, eos_ids=(1,))
    save_model(model, tmp_path / "model", small_tokenizer)
    engine = load_engine(LoadOptions(str(tmp_path / "model")))
    assert set(engine.stop_ids) == {1, 2}
    assert replace(engine, config=replace(engine.config, ignore_eos=True)).stop_ids == ()


def test_the_template_of_a_chat_decides_with(llama3_tokenizer: Path, tmp_path: Path) -> None:
    """--template llama3 for a model of another program: its answers end with <|eot_id|>."""
    save_model(random_model(vocab_size=300, eos_ids=(1,)), tmp_path / "model")
    for path in llama3_tokenizer.iterdir():
        shutil.copy(path, tmp_path / "model")
    model = minillama.load(tmp_path / "model")
    assert model.engine.stop_ids == (1,)
    assert model.chat(template="llama3").engine.stop_ids == (1, 4)


def test_a_merge_writes_what_ends_the_answers_of_its_adapter(
    llama3_tokenizer: Path, tmp_path: Path
) -> None:
    save_model(random_model(vocab_size=300, eos_ids=(1,)), tmp_path / "base")
    model = load_model(tmp_path / "base")
    lora = LoraConfig(rank=2, alpha=4.0, targets=("q_proj",))
    add_lora(model, lora, torch.Generator().manual_seed(0))
    save_adapter(model, lora, tmp_path / "adapter", str(tmp_path / "base"))
    for path in llama3_tokenizer.iterdir():
        shutil.copy(path, tmp_path / "adapter")
    (tmp_path / "adapter/minillama.json").write_text('{"template": "llama3"}')
    merge_lora(tmp_path / "base", [tmp_path / "adapter"], Output(tmp_path / "merged"))
    assert eos_of(tmp_path / "merged") == [[1, 4], [1, 4]]


def test_configs_that_are_complete_stay_as_they_are(tmp_path: Path, small_tokenizer) -> None:
    save_model(random_model(vocab_size=400), tmp_path, small_tokenizer)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7], "top_k": 3}')
    before = [(tmp_path / name).read_bytes() for name in ("config.json", "generation_config.json")]
    write_stop_ids(tmp_path)
    after = [(tmp_path / name).read_bytes() for name in ("config.json", "generation_config.json")]
    assert before == after
