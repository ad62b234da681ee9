"""Pieces to ids and mask, grown side by side: nothing is searched for afterwards to find out where an answer began.

    [BOS] "…### Response:" | " Paris" [EOS]        pieces
      1    13866 … 2277     |  3681     2          ids
      0      0   …   0      |   1       1          mask: is this token predicted?
"""

from collections.abc import Iterable

from minillama.chat import Piece
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
                raise UserError(f"{tokenizer.path}: has no {piece.control} token, which the template needs")
            start += 1
        else:
            text += piece.text
            ids[start:] = tokenizer.encode(text)
        del mask[len(ids):]
        mask += [int(piece.is_target)] * (len(ids) - len(mask))
    return ids, mask
