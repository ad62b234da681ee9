"""Random conversations, and what templates make of them, for the tests of chat.py."""

from hypothesis import strategies as st

from minillama.chat import Conversation, Turn, render
from minillama.data.encode import encode_pieces
from minillama.tokenizer import Tokenizer

WORDS = ["Hello", "天日", "12", "it's", "(a)", ":)", "x\ny", "é", "###", "the", "end."]
sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(" ".join)
turns = st.builds(Turn, sentences, sentences)
conversations = st.builds(
    Conversation, st.lists(turns, min_size=1, max_size=3).map(tuple), st.just("") | sentences
)


def encode(
    tokenizer: Tokenizer, template: str, conversation: Conversation
) -> tuple[list[int], list[int]]:
    """Ids and mask of a conversation."""
    return encode_pieces(tokenizer, render(template, conversation))


def text_of(template: str, conversation: Conversation) -> str:
    """The rendering as text, with control tokens by their letters."""
    letters = {"bos": "<s>", "eos": "</s>"}
    text = ""
    for piece in render(template, conversation):
        text += letters.get(piece.control, piece.control) or piece.text
    return text
