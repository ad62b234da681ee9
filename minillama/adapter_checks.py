"""Does an adapter fit a model? Every tensor needs one place, and every place its tensor.

An adapter whose names do not match would load without effect, and one that lacks a tensor would
compute something between the base and the tuned model. So both are errors that name the tensors.
"""

from torch import nn

from minillama.model import Llama
from minillama.peft_adapters import Adapter, LoraFactors

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

Shape = tuple[int, ...]


def misfits(model: Llama, adapter: Adapter) -> list[str]:
    """List the adapter's tensors that fit nowhere, and the places that get none."""
    shapes = whole_shapes(model)
    modules = []  # those that can have factors
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            modules.append(name)
    problems = _misfits_of_whole(adapter, shapes)
    for factors in adapter.factors:
        problems += _misfits_of_factors(adapter, factors, shapes)
    return problems + adapter.missing(modules)


def whole_shapes(model: Llama) -> dict[str, Shape]:
    """The shape of every parameter, by name, a tied head too; if ranks have parts, of the whole."""
    shapes = model.config.parameter_shapes()
    shapes.setdefault(HEAD, shapes[EMBEDDING])
    return shapes


def _misfits_of_whole(adapter: Adapter, shapes: dict[str, Shape]) -> list[str]:
    """Check the tensors that replace the model's. A larger one's shape is entered in `shapes`."""
    problems = []
    for name, tensor in adapter.whole.items():
        expected = shapes.get(name)
        if expected is None:
            problems.append(f"{name} fits no module")
            continue
        may_grow = name in (EMBEDDING, HEAD) and tensor.shape[1:] == expected[1:]
        grows = may_grow and tensor.shape[0] >= expected[0]
        if tensor.shape == expected or grows:
            shapes[name] = tensor.shape
        else:
            problems.append(f"{name} is {tensor.shape}, the model wants {expected}")
    rows = shapes[EMBEDDING][0]
    head_rows = shapes[HEAD][0]
    if not problems and rows != head_rows:
        problems.append(f"{EMBEDDING} has {rows} rows, {HEAD} {head_rows}")
    return problems


def _misfits_of_factors(
    adapter: Adapter, factors: LoraFactors, shapes: dict[str, Shape]
) -> list[str]:
    name = factors.module
    shape = shapes.get(factors.weight_name, ())
    is_target = not adapter.rule.targets or adapter.rule.includes(name)
    if len(shape) != 2 or not is_target:
        return [f"{name}.lora_A.weight fits no module"]
    rows, columns = shape
    rank = adapter.config.rank_of(name)
    problems = []
    for factor, tensor, expected in (
        ("lora_A", factors.a, (rank, columns)),
        ("lora_B", factors.b, (rows, rank)),
    ):
        if tensor.shape != expected:
            problems.append(f"{name}.{factor}.weight is {tensor.shape}, the model wants {expected}")
    return problems
