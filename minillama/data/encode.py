"""Pieces to ids and mask, grown side by side: nothing is searched for afterwards to find out where an answer began.

[BOS] "…### Response:" | " Paris" [EOS]        pieces
  1    13866 … 2277     |  3681     2          ids
  0      0   …   0      |   1       1          mask: is this token predicted?
"""

from collections.abc import Iterable

from minillama.chat import Conversation, Piece, render
from minillama.data.formats import Document, Part
from minillama.errors import UserError
from minillama.tokenizer import Tokenizer


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> tuple[list[int], list[int]]:
    """Ids and mask (1: a target) of rendered pieces, of equal length.

    A glued piece is encoded together with the text before it, and begins where that text's own ids would have ended: the
    counting rule of Stanford Alpaca, FastChat and AscendSpeed, kept even where the joint text merges across the boundary.
    """
    ids: list[int] = []
    mask: list[int] = []
    text, start = "", 0  # the run of glued text that is open, and where its ids start
    for piece in pieces:
        if piece.control or not piece.glued:
            text, start = "", len(ids)
        if piece.control:
            ids.append(tokenizer.control_id(piece.control))
            if ids[-1] is None:
                raise UserError(
                    f"{tokenizer.path}: has no {piece.control} token, which the template needs"
                )
            start += 1
        else:
            text += piece.text
            ids[start:] = tokenizer.encode(text)
        del mask[len(ids) :]
        mask += [int(piece.is_target)] * (len(ids) - len(mask))
    return ids, mask


def encode_document(
    tokenizer: Tokenizer, document: Document, template: str, append_eod: bool
) -> tuple[list[int], list[int] | None]:
    """(ids, mask) of a conversation by its template; (ids, None) of plain text, between begin and end tokens.

    append_eod: is the last answer, or the text, followed by the end token? Those between rounds belong to the template.
    """
    if isinstance(document, Conversation):
        pieces = render(template, document)
        return encode_pieces(
            tokenizer, pieces[:-1] if pieces[-1].control == "eos" and not append_eod else pieces
        )
    part = Part(document) if isinstance(document, str) else document
    ids = tokenizer.encode(part.text) if part.is_first else tokenizer.encode_next(part.text)
    begin = [tokenizer.bos_id] if part.is_first and tokenizer.bos_id is not None else []
    end = [tokenizer.eos_id] if part.is_last and append_eod and tokenizer.eos_id is not None else []
    return begin + ids + end, None
