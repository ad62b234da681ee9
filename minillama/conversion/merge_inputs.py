"""Do the inputs of a merge belong together? Vocabularies, and the bases that adapters name.

An adapter is made for one base and one vocabulary. Its tensors may fit another base all the same,
and the sum then computes nonsense. What is certainly wrong is refused; what may be is a warning.
"""

from collections.abc import Sequence
from pathlib import Path

from minillama.checkpoint.hf_reader import EMBEDDING, open_weights
from minillama.checkpoint.tokenizer_files import has_tokenizer
from minillama.errors import UserError
from minillama.files import read_json
from minillama.peft_adapters import Adapter
from minillama.peft_config import base_model_of
from minillama.tokenizer import SentencePieceTokenizer, open_tokenizer

PUBLISHED_SIZES = (
    "LLaMA's has 32000, Chinese-LLaMA's 49953, Chinese-Alpaca's 49954, Chinese-LLaMA-2's 55296"
)
LAST_NORM = "model.norm.weight"  # small, and another one after every full training


def notes_on_base(adapter: Path, base: Path, num_rows: int) -> list[str]:
    """Compare the base that an adapter's configuration names, if it is here, with the one it gets.

    num_rows: of the embedding that the adapter gets. A difference is a warning, because the base
    may be known by another name.
    """
    named = Path(base_model_of(adapter))
    if not (named / "config.json").is_file():
        return []
    try:
        trained_on = open_weights(named)
    except UserError:  # an incomplete base is no matter of this merge
        return []
    if LAST_NORM not in trained_on or EMBEDDING not in trained_on:
        return []
    warning = f"warning: {adapter} was trained on {named}, which has"
    trained_rows = trained_on[EMBEDDING].shape[0]
    if trained_rows != num_rows:
        return [f"{warning} {trained_rows} rows of vocabulary; here it is merged into {num_rows}"]
    if not trained_on[LAST_NORM].equals(open_weights(base)[LAST_NORM]):
        return [f"{warning} another {LAST_NORM} than {base}"]
    return []


def notes_on_vocabulary(sources: Sequence[Path], num_rows: int) -> list[str]:
    """Compare the tokenizer of the output with an embedding that an adapter has enlarged.

    sources: directories; the output gets the tokenizer of the first that has one.
    """
    for source in sources:
        if not has_tokenizer(source):
            continue
        vocab_size = open_tokenizer(source).size
        if vocab_size == num_rows:
            return []
        return [
            f"warning: the adapters enlarge the embedding to {num_rows} rows, but the output's "
            f"tokenizer, from {source}, has {vocab_size} tokens; put the tokenizer that the "
            "adapter was trained with into its directory"
        ]
    return []


def check_vocabulary(adapter: Adapter, num_rows: int) -> None:
    """Compare the size of an adapter's vocabulary with the rows of the embedding."""
    path = adapter.path / "tokenizer.model"
    vocab_size = _count_tokens(path)
    if EMBEDDING in adapter.whole and vocab_size != num_rows:
        raise UserError(
            f"{path}: {vocab_size} tokens, but the adapter's embedding has {num_rows} rows; a "
            f"tokenizer of another model ({PUBLISHED_SIZES})"
        )
    if vocab_size > num_rows:
        raise UserError(
            f"{path}: {vocab_size} tokens, but the embedding has {num_rows} rows and the adapter "
            "brings no larger one (modules_to_save: embed_tokens, lm_head); was it saved whole?"
        )


def _count_tokens(path: Path) -> int:
    """Count the tokens of tokenizer.model and those that the JSON files beside it add.

    Chinese-Alpaca's [PAD] is such an added token.
    """
    added: list[object] = []
    added_tokens = path.with_name("added_tokens.json")
    if added_tokens.is_file():
        added.extend(read_json(added_tokens))
    special_tokens = path.with_name("special_tokens_map.json")
    if special_tokens.is_file():
        added.extend(read_json(special_tokens).values())
    model = SentencePieceTokenizer(path).model
    tokens = {model.id_to_piece(index) for index in range(model.get_piece_size())}
    for token in added:
        if isinstance(token, dict):
            tokens.add(token["content"])
        elif isinstance(token, str):
            tokens.add(token)
    return len(tokens)
