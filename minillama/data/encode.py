"""Documents to ids and mask.

Both grow together, one piece at a time, so nothing has to be searched for afterwards to find out
where an answer began.

    [BOS] "…### Response:" | " Paris" [EOS]        pieces
      1    13866 … 2277     |  3681     2          ids
      0      0   …   0      |   1       1          mask: is this token a target?
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

from minillama.chat import Conversation, Piece, Turn, is_jinja, render
from minillama.data.formats import Document
from minillama.data.records import TextBlock
from minillama.errors import UserError
from minillama.json_values import check_encodable
from minillama.tokenizer import Tokenizer

if TYPE_CHECKING:  # a leaf: it is imported where a chat template is used
    from minillama.chat_template import ChatTemplate


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> tuple[list[int], list[int]]:
    """Ids and mask (1: a target) of rendered pieces, of equal length.

    A glued piece is encoded together with the text before it. It begins where the ids of that text
    alone would have ended: the counting rule of Stanford Alpaca, FastChat and AscendSpeed. They
    keep it even if a token of the joint text crosses this boundary, so it is kept here too. Behind
    a control token, a glued piece is encoded as transformers does it there.
    """
    ids: list[int] = []
    mask: list[int] = []
    text = ""  # the last fresh piece and what is glued to it
    start = 0  # where the ids of `text` begin
    is_behind_control = False
    for piece in pieces:
        if piece.control or not piece.glued:
            text = ""
            start = len(ids)
            is_behind_control = False
        if piece.control:
            ids += _control_ids(tokenizer, piece.control)
            start = len(ids)
            is_behind_control = True
        else:
            text += piece.text
            check_encodable(piece.text)
            encode = tokenizer.encode_behind_control if is_behind_control else tokenizer.encode
            ids[start:] = encode(text)
        del mask[len(ids) :]  # the joint text can have fewer ids than its beginning alone
        num_new = len(ids) - len(mask)
        mask += [int(piece.is_target)] * num_new
    return ids, mask


def encode_document(
    tokenizer: Tokenizer, document: Document, template: str, append_eod: bool
) -> tuple[list[int], list[int] | None]:
    """Ids and mask of a conversation; ids and None of plain text, where every token is a target.

    append_eod: whether EOS follows the text, or the last answer. The template decides about EOS
    between two rounds.
    """
    if isinstance(document, str):
        return encode_block(tokenizer, TextBlock(document), append_eod), None
    if not document.turns:
        return [], []
    pieces = render_for(tokenizer, template, document)
    if pieces[-1].control == "eos" and not append_eod:
        del pieces[-1]
    return encode_pieces(tokenizer, pieces)


def render_for(tokenizer: Tokenizer, template: str, conversation: Conversation) -> list[Piece]:
    """The pieces of a conversation in a template: a name, or the text of a chat template."""
    if is_jinja(template):
        return open_chat_template(tokenizer, template).pieces(conversation)
    return render(template, conversation)


@lru_cache(maxsize=8)
def open_chat_template(tokenizer: Tokenizer, template: str) -> "ChatTemplate":
    """A chat template for a tokenizer."""
    from minillama.chat_template import ChatTemplate

    return ChatTemplate(template, tokenizer.named, tokenizer.added_tokens())


def end_of_answer(tokenizer: Tokenizer, template: str) -> str:
    """The name of the token behind an answer; "" for none, or for no template."""
    if template in ("", "none"):
        return ""
    try:
        pieces = render_for(tokenizer, template, Conversation((Turn("a", "b"),)))
    except UserError:
        return ""  # a chat template without such a token; training refuses it
    end = [piece for piece in pieces if piece.is_target][-1]
    return end.control or end.text


def encode_block(tokenizer: Tokenizer, block: TextBlock, append_eod: bool) -> list[int]:
    """The ids of a part of a plain text.

    BOS begins the text where the tokenizer adds it, and EOS ends it if append_eod.
    """
    check_encodable(block.text)
    ids = tokenizer.encode(block.text, follows_line_break=not block.is_first)
    if block.is_first:
        ids = [*tokenizer.starts_with, *ids]
    if block.is_last and append_eod and tokenizer.eos_id is not None:
        ids.append(tokenizer.eos_id)
    return ids


def _control_ids(tokenizer: Tokenizer, name: str) -> list[int]:
    """The id of a control piece. BOS has none where the tokenizer adds none."""
    if name == "bos":
        return tokenizer.starts_with
    token = tokenizer.control_id(name)
    if token is None:
        raise UserError(f"{tokenizer.path}: has no {name} token, which the template needs")
    return [token]
