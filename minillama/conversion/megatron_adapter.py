"""A LoRA run of Megatron as a PEFT directory.

The run saved its factors and the modules that it trained whole. The reader has joined them, and has
given q, k and v each their rows of B and a copy of their common A. So s·B·A of each module is what
the run added to it.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from minillama.conversion.writer import Conversion, LazyTensors, Output, write_checkpoint
from minillama.errors import UserError
from minillama.llama_config import LlamaConfig
from minillama.peft_adapters import write_adapter
from minillama.peft_config import LoraConfig
from minillama.tensor_writers import TensorSpecs

A = ".lora_A.weight"  # (R, in)
B = ".lora_B.weight"  # (out, R)


def write_megatron_adapter(
    output: Output,
    inputs: Sequence[Path],
    tensors: LazyTensors,
    config: LlamaConfig,
    alpha: float,
    base: str,
) -> Conversion:
    """Write factors and whole tensors, by their names in the model, as a PEFT directory.

    base: where the base model is, for adapter_config.json.
    Raises UserError for factors that do not fit the model, and if alpha is not known (0).
    """
    if not alpha:
        raise UserError("the files do not hold the alpha of LoRA; name it with --lora_alpha")
    modules = [name.removesuffix(A) for name in tensors if name.endswith(A)]
    shapes = config.parameter_shapes()
    ranks = set()
    for module in modules:
        rank, columns = tensors[module + A].shape
        rows = tensors[module + B].shape[0]
        ranks.add(rank)
        if shapes.get(f"{module}.weight") != (rows, columns):
            raise UserError(
                f"{module}: B·A is {(rows, columns)}, the weight is "
                f"{shapes.get(f'{module}.weight')}; --config names another model"
            )
    if len(ranks) != 1:
        raise UserError(f"the factors have the ranks {sorted(ranks)}; one is supported")
    whole = [name for name in tensors if not name.endswith((A, B))]
    lora = LoraConfig(
        rank=ranks.pop(),
        alpha=alpha,
        targets=tuple(sorted({module.rsplit(".", 1)[-1] for module in modules})),
        modules_to_save=tuple(sorted(name.split(".")[-2] for name in whole)),
    )
    write_tensors = partial(_write_tensors, lora, base)
    return write_checkpoint(output, inputs, tensors, _nothing_beside, write_tensors)


def _write_tensors(
    lora: LoraConfig,
    base: str,
    directory: Path,
    tensors: Iterator[tuple[str, Tensor]],
    specs: TensorSpecs,
) -> None:
    values = {name: tensor.to(specs[name][0]) for name, tensor in tensors}
    write_adapter(directory, lora, values, base)


def _nothing_beside(directory: Path) -> None:
    """Do nothing: an adapter has no files beside its weights."""
