"""The two examples of docs/parallel.md: a block of two heads, and a vocabulary of three tokens."""

from pathlib import Path

import pytest
import torch

from minillama import comm
from minillama.llama_config import LlamaConfig
from minillama.model import Llama
from minillama.parallel.tensor import parallelise
from tests.ranks import run_on_ranks

PAGE = Path(__file__).parents[1] / "docs" / "parallel.md"
CONFIG = LlamaConfig(
    dim=2,
    n_layers=1,
    n_heads=2,
    n_kv_heads=2,
    head_dim=2,
    ffn_dim=2,
    vocab_size=3,
    max_seq_len=8,
    norm_eps=1e-5,
    rope_theta=10000.0,
)
V_ROWS = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]]
O_ROWS = [[1.0, 2.0, 3.0, 0.0], [0.0, 1.0, 1.0, 2.0]]


def make_model() -> Llama:
    model = Llama(CONFIG).initialise(torch.Generator().manual_seed(0))
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.v_proj.weight.copy_(torch.tensor(V_ROWS))
        attention.o_proj.weight.copy_(torch.tensor(O_ROWS))
        model.lm_head.weight.copy_(torch.tensor([[2.0, 0.0], [1.0, 0.0], [3.0, 0.0]]))
    return model


def attend(model: Llama) -> dict[str, list[float]]:
    """What the attention makes of x = (1, 2), and the gradients for dy = (1, 1)."""
    attention = model.model.layers[0].self_attn
    found = {}

    def keep(name: str, values: torch.Tensor) -> None:
        found[name] = values.flatten().tolist()

    def keep_v(module: torch.nn.Module, args: tuple, v: torch.Tensor) -> None:
        keep("v", v)
        keep("part of y", attention.o_proj.product(v.detach()))
        v.register_hook(lambda dv: keep("dv", dv))

    def keep_part_of_dx(module: torch.nn.Module, args: tuple) -> None:
        args[0].register_hook(lambda dx: keep("part of dx", dx))

    attention.v_proj.register_forward_pre_hook(keep_part_of_dx)
    attention.v_proj.register_forward_hook(keep_v)
    x = torch.tensor([[[1.0, 2.0]]], requires_grad=True)
    cos = torch.ones(1, 1, 2)  # the rotation of position 0
    sin = torch.zeros(1, 1, 2)
    y = attention(x, cos, sin, None, None)
    y.backward(torch.ones(1, 1, 2))
    keep("y", y)
    assert x.grad is not None
    keep("dx", x.grad)
    return found


def attend_on_rank() -> dict[str, list[float]]:
    with comm.start("cpu", timeout_minutes=1) as mesh:
        model = make_model()
        parallelise(model, mesh)
        return attend(model)


def cells(row: str) -> list[str]:
    """The cells of the page's row that begins with this text."""
    (line,) = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {row} ")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def vector(values: list[float]) -> str:
    return f"({values[0]:g}, {values[1]:g})"


def test_the_page_works_two_heads_on_two_ranks_by_hand() -> None:
    one = attend(make_model())
    first, second = run_on_ranks(2, attend_on_rank)
    assert first["y"] == second["y"] == one["y"]
    assert first["dx"] == second["dx"] == one["dx"]
    rows = {
        "v = rows · x": ("v", ""),
        "y = columns · v": ("part of y", f"g: {vector(one['y'])}"),
        "dv, for dy = (1, 1)": ("dv", ""),
        "dx = rowsᵀ · dv": ("part of dx", f"f: {vector(one['dx'])}"),
    }
    for row, (name, total) in rows.items():
        assert cells(row) == [vector(first[name]), vector(second[name]), total]
    assert cells("rows of v")[0] == f"{vector(V_ROWS[0])}, {vector(V_ROWS[1])}"
    columns = torch.tensor(O_ROWS).T.tolist()
    assert cells("columns of o")[1] == f"{vector(columns[2])}, {vector(columns[3])}"


def loss_on_rank() -> float:
    with comm.start("cpu", timeout_minutes=1) as mesh:
        model = make_model()
        parallelise(model, mesh)
        num_rows = len(model.lm_head.weight)
        assert num_rows == (1, 2)[mesh.rank]
        return model.lm_head.loss_sum(torch.tensor([[1.0, 0.0]]), torch.tensor([1])).item()


def test_the_page_works_the_loss_of_three_tokens_by_hand() -> None:
    loss = make_model().lm_head.loss_sum(torch.tensor([[1.0, 0.0]]), torch.tensor([1])).item()
    assert run_on_ranks(2, loss_on_rank) == [pytest.approx(loss)] * 2
    assert cells("loss = log(sum) − chosen") == ["", "", f"{loss:.4f}"]
    z = torch.tensor([2.0, 1.0, 3.0])
    assert cells("sum of exp(z − top)") == ["0.3679", "0.1353 + 1", f"{(z - 3).exp().sum():.4f}"]
