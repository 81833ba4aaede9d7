"""On a GPU the kernels of adapters and fusions are compiled before the first of them is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from device_kernels import DEVICE, serve_in_triton
from served_adapters import (
    blend,
    collect_all,
    lora,
    make_params,
    running_engine,
    write_lora,
    write_model,
)
from served_fusions import forget_fusions, fusion, write_members, write_mix_and_duo

from fusionserve.config import EngineConfig
from fusionserve.engine.base_model import load_base_model
from fusionserve.engine.kernel_warm_up import _groups
from fusionserve.kernels.device import rank_items

pytestmark = pytest.mark.gpu

KERNELS = ("shrink_kernel", "shrink_ids_kernel", "expand_kernel", "weigh_kernel")


@contextmanager
def noted_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[object, ...]]]:
    """What Triton compiles anew: the adapters' kernels launched in the block, with what they are compiled for."""
    noted: set[tuple[object, ...]] = set()

    class Noted:
        """A kernel that notes its launches."""

        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*arguments: object, **constants: object) -> None:
                named = zip(self.kernel.arg_names, arguments, strict=False)
                kinds = [kind_of(value) for name, value in named if name not in ("num_items", "num_fused")]
                noted.add((self.kernel.__name__, *kinds, *sorted(constants.items())))
                self.kernel[grid](*arguments, **constants)

            return launch

    with monkeypatch.context() as patch:
        for name in KERNELS:
            patch.setattr(rank_items, name, Noted(getattr(rank_items, name)))
        yield noted


def kind_of(value: object) -> object:
    """What of an argument Triton compiles for."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return (value == 1, value % 16 == 0) if isinstance(value, int) else type(value)


async def test_no_step_is_the_first_to_launch_a_kernel_of_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "model")
    members = write_members(tmp_path / "adapters")
    write_lora(members / "dee", seed=9, has_head=True)
    options = {"fusion_dirs": (write_mix_and_duo(tmp_path / "fusions", members),), "adapter_pool_ranks": 96}
    adaptations = (lora("dee"), blend(ada=0.5, bea=0.5), fusion("mix"), fusion("duo"))
    asked = [make_params(f"r{i}", each, num_tokens=3) for i, each in enumerate(adaptations)]
    serve_in_triton(monkeypatch)
    async with running_engine(tmp_path / "model", members, device=DEVICE.type, **options) as engine:
        with noted_launches(monkeypatch) as at_the_start, torch.inference_mode():
            engine.runner._runner._compile_adapter_kernels()  # as `warm_up` does on a GPU
        with noted_launches(monkeypatch) as while_serving:
            await collect_all(engine, asked)
        await forget_fusions(engine)
    assert {name for name, *_ in while_serving} == set(KERNELS) - {"shrink_ids_kernel"}
    assert while_serving <= at_the_start, while_serving - at_the_start


def test_modules_that_share_an_input_are_warmed_up_by_number(tmp_path: Path) -> None:
    """An adapter of queries and values has a group of two."""
    directory = str(write_model(tmp_path / "model"))
    base = load_base_model(EngineConfig(model=directory, model_name="tiny", device="cpu"))
    sizes = [[module.d_out for module in group] for group in _groups(base)]
    assert sizes == [[32], [32, 16], [32, 16, 16], [40], [40, 40], [32], [16], [48]]
