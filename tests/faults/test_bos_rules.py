"""Whether a text begins with BOS, and which token that is: as AutoTokenizer decides."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minillama.data.encode import encode_document
from minillama.errors import UserError
from minillama.evaluation.options import EvalOptions
from minillama.evaluation.perplexity import Perplexity
from minillama.tokenizer import Tokenizer, open_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden/model"
BEGIN, END, EOT = "<|begin|>", "<|end|>", "<|eot|>"
NAMES = {"bos_token": BEGIN, "eos_token": END}
WUMPUS = {
    "content": "Wumpus",
    "special": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "single_word": False,
}
TEXTS = ["", "red", "the cat Wumpus", "Say é\nred ▁x", "Wumpus<|eot|>Wumpus cat", " </s> red"]

# tokenizer_config.json; None: there is no such file
CONFIGS: dict[str, dict[str, Any] | None] = {
    "no config": None,
    "names only": NAMES,
    "a class of its own rule": {**NAMES, "tokenizer_class": "LlamaTokenizer"},
    "the fast class": {**NAMES, "tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True},
    "no BOS for LLaMA": {**NAMES, "tokenizer_class": "LlamaTokenizer", "add_bos_token": False},
    "LLaMA 3's class": {**NAMES, "tokenizer_class": "PreTrainedTokenizerFast"},
    "a key without effect": {
        **NAMES,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
    },
    "SmolLM2's class": {**NAMES, "tokenizer_class": "GPT2Tokenizer"},
    "Qwen's class": {**NAMES, "tokenizer_class": "Qwen2Tokenizer", "unk_token": END},
    "NeoX has its own rule": {**NAMES, "tokenizer_class": "GPTNeoXTokenizer"},
    "Gemma has its own rule": {**NAMES, "tokenizer_class": "GemmaTokenizer"},
    "an added word": {
        **NAMES,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {"400": WUMPUS},
    },
}


@pytest.fixture(scope="module")
def write_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that writes a directory with a byte-level tokenizer.json, as LLaMA 3 has."""
    tokenizers = pytest.importorskip("tokenizers")

    def write(has_post_processor: bool, config: dict[str, Any] | None) -> Path:
        folder = tmp_path_factory.mktemp("json")
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=[BEGIN, END, EOT],
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )
        model.train_from_iterator(["Say red blue king dog the cat"] * 9, trainer)
        if has_post_processor:
            model.post_processor = tokenizers.processors.TemplateProcessing(
                single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, 0)]
            )
        model.save(str(folder / "tokenizer.json"))
        if config is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
        shutil.copy(GOLDEN / "config.json", folder)  # AutoTokenizer asks for the kind of model
        return folder

    return write


def assert_is_transformers(folder: Path) -> Tokenizer:
    """Compare with AutoTokenizer. The letters of special tokens are text here, so there too."""
    transformers = pytest.importorskip("transformers")
    ours = open_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    for text in TEXTS:
        ids = theirs.encode(text, split_special_tokens=True)
        assert encode_document(ours, text, "none", append_eod=False)[0] == ids, text
        expected = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == expected
    return ours


@pytest.mark.parametrize("map_file", ["", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("has_post_processor", [True, False], ids=["post", "no post"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_tokenizer_json_is_transformers(
    name: str, has_post_processor: bool, map_file: str, write_tokenizer
) -> None:
    folder = write_tokenizer(has_post_processor, CONFIGS[name])
    if map_file == "special_tokens_map.json":
        (folder / map_file).write_text(json.dumps(NAMES))
    elif map_file:
        (folder / map_file).write_text(json.dumps({"Wumpus": 300, "Snark": 301}))
    if name == "no config" and map_file != "special_tokens_map.json":
        # transformers makes a new token <s>, for which no model has a row
        starts_with = [0] if has_post_processor else []
        assert open_tokenizer(folder).starts_with == starts_with
        return
    ours = assert_is_transformers(folder)
    assert ours.bos_rule


def test_bos_only_in_the_special_tokens_map_is_found(write_tokenizer) -> None:
    folder = write_tokenizer(False, None)
    assert open_tokenizer(folder).starts_with == []
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": EOT}}))
    tokenizer = open_tokenizer(folder)
    assert tokenizer.starts_with == [2]
    assert tokenizer.bos_rule == "the rule of LlamaTokenizer"
    assert tokenizer.sha256 != open_tokenizer(write_tokenizer(False, None)).sha256


def test_a_post_processor_with_two_tokens_before_the_text_is_refused(write_tokenizer) -> None:
    folder = write_tokenizer(False, {"tokenizer_class": "PreTrainedTokenizerFast"})
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    special = {"id": BEGIN, "ids": [0], "tokens": [BEGIN]}
    begin = {"SpecialToken": {"id": BEGIN, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, begin, text],
        "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {BEGIN: special},
    }
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer\.json: its post-processor begins .* 2 tokens"):
        open_tokenizer(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"add_bos_token": False},
        {"add_bos_token": None},
        {"bos_token": "</s>", "eos_token": "</s>"},  # Stanford Alpaca's
        {"eos_token": "<s>"},
        {"additional_special_tokens": ["<|im_end|>"], "eos_token": "<|im_end|>"},
    ],
    ids=str,
)
def test_a_tokenizer_model_obeys_the_config_beside_it(
    config: dict[str, Any], small_tokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    shutil.copy(small_tokenizer.path, tmp_path / "tokenizer.model")
    full = {"tokenizer_class": "LlamaTokenizer", "legacy": True, **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(full))
    ours = open_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, use_fast=False)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    ids, _ = encode_document(ours, "the cat", "none", append_eod=False)
    assert ids == theirs.encode("the cat")


def test_an_empty_name_of_bos_means_the_models_own(small_tokenizer, tmp_path: Path) -> None:
    """The first published LLaMA directories have "bos_token": "", which transformers takes as 0."""
    shutil.copy(small_tokenizer.path, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "", "eos_token": ""}')
    tokenizer = open_tokenizer(tmp_path)
    assert (tokenizer.starts_with, tokenizer.eos_id) == ([1], 2)


def test_a_template_begins_with_bos_only_where_the_tokenizer_adds_it(write_tokenizer) -> None:
    from minillama.chat import Conversation, Turn

    conversation = Conversation((Turn("red", None),))
    for has_post_processor in (True, False):
        folder = write_tokenizer(has_post_processor, CONFIGS["LLaMA 3's class"])
        tokenizer = open_tokenizer(folder)
        ids, _ = encode_document(tokenizer, conversation, "vicuna_v1.1", append_eod=False)
        assert (ids[0] == tokenizer.bos_id) == has_post_processor


@pytest.mark.parametrize("eos", [END, None])
def test_perplexity_works_without_bos(eos: str | None, write_tokenizer, tmp_path: Path) -> None:
    """A document follows EOS; where there is no such token, its first token is not predicted."""
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": None}
    folder = write_tokenizer(False, config | ({"eos_token": eos} if eos else {}))
    (tmp_path / "text.txt").write_text("red blue king")
    tokenizer = open_tokenizer(folder)
    options = EvalOptions(task="perplexity", data=str(tmp_path / "text.txt"))
    benchmark = Perplexity(options, tokenizer, max_length=64)
    (query,) = benchmark.queries.values()
    ids = tokenizer.encode("red blue king")
    if eos:
        assert (query.context, query.continuations) == ([1], [ids])
    else:
        assert (query.context, query.continuations) == (ids[:1], [ids[1:]])
