"""The optimizer's state in a checkpoint: written by each rank, found again by parameter name.

    state-00003-0.safetensors      of rank 3, its flat vector 0: master, m and v of the slice that
                                   the rank owns, and in the header a table of pieces:

        name    model.layers.0.self_attn.q_proj.weight
        shape   of the whole parameter: 4096, 4096
        axis    0: the file has some of its rows (null: there is one part, the whole)
        start   1024: from this row on
        stop    2048: up to this row
        first   the piece's elements of this part, flattened: from this one on
        last    up to this one
        offset  where they lie in master, m and v

Each element of each parameter is in one file. A rank that resumes looks its parameters up in all
tables, whatever grid of ranks wrote the files. It puts the whole of one parameter together at a
time, and takes its own part, unless the files have the same part.

Before, files were called state-VECTOR-POSITION.safetensors and had no tables: the position in the
flat vector said which parameters they hold. These are still read. There was no grid then, so the
flat vector of each dtype follows from the names, shapes and dtypes of the parameters.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillama.errors import UserError
from minillama.parallel.flat_layout import lay_out
from minillama.parallel.parts import Part, SavedPiece, WholeParameter
from minillama.parallel.sharded_optimizer import SavedSlice
from minillama.tensor_files import TensorRef, read_metadata, read_safetensors
from minillama.tensor_writers import write_safetensors

PIECES = "pieces"  # key of the header


@dataclass(frozen=True)
class FilePiece:
    """A piece, and the vectors of its file by name: master, m, v."""

    piece: SavedPiece
    vectors: dict[str, TensorRef]


def write_slice(path: Path, part: SavedSlice) -> None:
    """Write what a rank saves of one flat vector."""
    table = [_as_json(piece) for piece in part.pieces]
    write_safetensors(path, part.tensors, {PIECES: json.dumps(table)})


def _as_json(piece: SavedPiece) -> dict[str, Any]:
    part = piece.part
    return {
        "name": part.name,
        "shape": list(part.whole_shape),
        "axis": part.axis,
        "start": part.start,
        "stop": part.stop,
        "first": piece.first,
        "last": piece.last,
        "offset": piece.offset,
    }


def _from_json(row: Mapping[str, Any]) -> SavedPiece:
    part = Part(row["name"], tuple(row["shape"]), row["axis"], row["start"], row["stop"])
    return SavedPiece(part, row["first"], row["last"], row["offset"])


class SavedOptimizer:
    """The optimizer's state in a checkpoint directory.

    Args:
        directory: the checkpoint.
        parameters: all that this run trains, by name, in the order of the model.

    Raises UserError if the checkpoint holds the state of other parameters.
    """

    def __init__(self, directory: Path, parameters: Mapping[str, WholeParameter]) -> None:
        self.directory = directory
        # name of a parameter -> each part that files hold of it -> the pieces of that part
        self.pieces: dict[str, dict[Part, list[FilePiece]]] = {}
        num_saved = 0
        for each in _read_pieces(directory, parameters):
            piece = each.piece
            by_part = self.pieces.setdefault(piece.part.name, {})
            by_part.setdefault(piece.part, []).append(each)
            num_saved += piece.last - piece.first
        num_trained = sum(parameter.size for parameter in parameters.values())
        if num_saved != num_trained:
            raise UserError(
                f"{directory}: holds {num_saved:,} trained parameters, this run has "
                f"{num_trained:,}; it belongs to another run"
            )
        for name, parameter in parameters.items():
            self._check_parameter(name, parameter)

    def _check_parameter(self, name: str, parameter: WholeParameter) -> None:
        """Raise UserError unless the files hold a parameter of this shape, and all of it."""
        by_part = self.pieces.get(name, {})
        if {part.whole_shape for part in by_part} != {parameter.shape}:
            raise UserError(
                f"{self.directory}: holds no optimizer state of {name} {parameter.shape}; "
                "it belongs to another run"
            )
        for part, pieces in by_part.items():
            pieces.sort(key=lambda each: each.piece.first)
            firsts = [each.piece.first for each in pieces]
            lasts = [each.piece.last for each in pieces]
            if [*firsts, prod(part.shape)] != [0, *lasts]:
                raise UserError(
                    f"{self.directory}: lacks a part of the optimizer state of {name}; "
                    "name another checkpoint with --resume DIR"
                )

    def read(self, part: Part, vector: str, first: int, last: int) -> Tensor:
        """Elements first … last of a flattened part, in fp32. vector: "master", "m" or "v"."""
        by_part = self.pieces[part.name]
        if part in by_part:
            return _read_elements(by_part[part], vector, first, last)
        whole = torch.empty(part.whole_shape, dtype=torch.float32)  # memory is used where written
        for saved, pieces in by_part.items():
            if saved.overlaps(part):
                target = saved.cut_from(whole)
                values = _read_elements(pieces, vector, 0, target.numel())
                target.copy_(values.view(saved.shape))
        return part.cut_from(whole).reshape(-1)[first:last]


def _read_elements(pieces: list[FilePiece], vector: str, first: int, last: int) -> Tensor:
    """Elements first … last of the flattened part that these are the pieces of."""
    result = torch.empty(last - first, dtype=torch.float32)
    for each in pieces:
        piece = each.piece
        start = max(first, piece.first)
        stop = min(last, piece.last)
        if start < stop:
            offset = piece.offset - piece.first
            values = each.vectors[vector].read_part(start + offset, stop + offset)
            result[start - first : stop - first] = values
    return result


def _read_pieces(directory: Path, parameters: Mapping[str, WholeParameter]) -> list[FilePiece]:
    """All pieces of all files of a checkpoint."""
    pieces = []
    for path in sorted(directory.glob("state-*.safetensors")):
        vectors = read_safetensors(path)
        metadata = read_metadata(path)
        if PIECES in metadata:
            table = [_from_json(row) for row in json.loads(metadata[PIECES])]
        else:
            table = _pieces_by_position(path, vectors["m"].shape[0], parameters)
        pieces += [FilePiece(piece, vectors) for piece in table]
    return pieces


def _pieces_by_position(
    path: Path, length: int, parameters: Mapping[str, WholeParameter]
) -> list[SavedPiece]:
    """The pieces of a file without a table. length: of its vectors."""
    _, number, position = path.stem.split("-")
    names_by_vector = _vectors_without_tables(parameters)
    if int(number) >= len(names_by_vector):
        raise UserError(f"{path}: this run has no flat vector {number}; it belongs to another run")
    names = names_by_vector[int(number)]
    layout = lay_out([parameters[name].shape for name in names])
    start = int(position)
    pieces = []
    for place in layout.pieces(start, start + length):
        name = names[place.index]
        part = Part(name, parameters[name].shape)
        pieces.append(SavedPiece(part, place.first, place.last, place.offset))
    is_empty = length == 0  # a rank may own padding alone
    if not is_empty and start + length > layout.total:
        raise UserError(
            f"{path}: ends at element {start + length:,} of a flat vector, which has "
            f"{layout.total:,} in this run; it belongs to another run"
        )
    return pieces


def _vectors_without_tables(parameters: Mapping[str, WholeParameter]) -> list[list[str]]:
    """The names in each flat vector, as it was: one for each dtype, the largest first, and in it
    matrices before 1-D parameters.
    """
    by_dtype: dict[torch.dtype, list[str]] = {}
    for name, parameter in parameters.items():
        by_dtype.setdefault(parameter.dtype, []).append(name)

    def size(names: list[str]) -> int:
        return sum(parameters[name].size for name in names)

    groups = [by_dtype[dtype] for dtype in sorted(by_dtype, key=str)]
    groups.sort(key=size, reverse=True)
    return [sorted(names, key=lambda name: len(parameters[name].shape) <= 1) for names in groups]
