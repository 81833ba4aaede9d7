"""A product that is added to a residual: on a GPU in one launch, wherever that rounds no more than two would."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loose_adapters import D_IN, D_OUT, FIRST, make_adapter, make_content, make_lora, make_modules
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusionserve.adapters.adapted_linear import AdaptedLinear, Projections
from fusionserve.adapters.pool import AdapterPool
from fusionserve.adapters.row_plan import PlanCell, RowPlan, WholeModuleTokens
from fusionserve.kernels.device import triton_use


class Operations(TorchDispatchMode):
    """The names of torch's operations in its block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_use, "INTERPRETS", True)


def make(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_group(base: nn.Module) -> Projections:
    pool = AdapterPool(make_modules(), 32, dtype=torch.float32, device=torch.device("cpu"))
    return Projections([AdaptedLinear(base, FIRST, pool.rows(FIRST), PlanCell())])


def make_linear(d_in: int, d_out: int, dtype: torch.dtype, *, bias: bool = False) -> nn.Linear:
    base = nn.Linear(d_in, d_out, bias=bias, dtype=dtype).requires_grad_(requires_grad=False)
    base.weight.copy_(make(d_out, d_in, seed=1) * d_in**-0.5)
    return base


@pytest.mark.usefixtures("on_device")
@torch.inference_mode()
def test_product_and_residual_are_one_launch_and_rounded_once() -> None:
    base = make_linear(256, 64, torch.bfloat16)
    x, residual = (make(8, width, seed=width, dtype=torch.bfloat16) for width in (256, 64))
    exact, apart = residual.double() + x.double() @ base.weight.double().T, residual + base(x)
    with Operations() as operations:
        together = make_group(base).add_(x, residual)
    assert together is residual and [name for name in operations.names if "add" in name] == ["addmm_"]
    assert "mm" not in operations.names
    assert (together.double() - exact).norm() < (apart.double() - exact).norm()


@torch.inference_mode()
def test_cpu_rounds_the_product_before_it_is_added() -> None:
    base = make_linear(256, 64, torch.bfloat16)
    x, residual = (make(8, width, seed=width, dtype=torch.bfloat16) for width in (256, 64))
    assert torch.equal(make_group(base).add_(x, residual), residual + base(x))


@pytest.mark.usefixtures("on_device")
@torch.inference_mode()
def test_module_with_a_bias_is_computed_apart() -> None:
    base = make_linear(D_IN, D_OUT, torch.float32, bias=True)
    x, residual = make(3, D_IN, seed=2), make(3, D_OUT, seed=3)
    assert torch.equal(make_group(base).add_(x, residual), residual + base(x))


@pytest.mark.usefixtures("on_device")
@torch.inference_mode()
def test_whole_modules_change_no_bit_of_their_neighbours() -> None:
    scales = torch.rand(D_OUT, generator=torch.Generator().manual_seed(4)) + 0.5
    lora = replace(make_lora(3, seed=1), magnitude=torch.ones(D_OUT))
    dora = make_adapter(make_content({FIRST: lora}, column_scales={FIRST: scales}))
    base, x, residual = make_linear(D_IN, D_OUT, torch.float32), make(4, D_IN, seed=2), make(4, D_OUT, seed=3)
    group = make_group(base)
    alone = group.add_(x, residual.clone())
    group.cell.plan = RowPlan(4, whole_modules=(WholeModuleTokens(1, 3, dora),))
    beside = group.add_(x, residual.clone())
    assert torch.equal(beside[[0, 3]], alone[[0, 3]])
    torch.testing.assert_close(beside[1:3], residual[1:3] + scales * base(x[1:3]))
