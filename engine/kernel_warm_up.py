"""Launches the kernels of adapters and fusions before the server is ready, so that no step waits for a compiler.

Triton compiles a kernel when it is first launched with its constants: the partial sums of a group's inputs, its number
of modules, the width of the widest fusion. The tables are empty, so nothing is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm

from fusionserve.adapters.base_modules import BaseModule, ModuleKind
from fusionserve.engine.base_model import BaseModel
from fusionserve.engine.device_plan import DevicePlanner
from fusionserve.kernels.device.group_parts import GroupParts
from fusionserve.kernels.device.rank_items import RankItems
from fusionserve.kernels.segments import PartRows

_FUSION_WIDTHS = (0, 1, 2, 4, 8)  # without fusions, and with up to 8 members: few have more


def launch_adapter_kernels(base: BaseModel, planner: DevicePlanner) -> None:
    """Compiles what adapters and usual fusions of the base are computed by, with a progress bar on a terminal."""
    like, embedding = torch.empty(0, dtype=base.dtype, device=base.device), base.modules.embedding
    image = planner.empty_tables(num_items=1, num_groups=1, num_fused=1, num_member_rows=1)
    groups = _groups(base)
    for width in tqdm(_FUSION_WIDTHS, desc="compiling kernels", disable=None, leave=False):
        items = planner.items_of(image.tables, width)
        for modules in groups:
            x, parts = like.new_zeros(1, modules[0].d_in), _make_parts(modules, like)
            items.add_(x, parts, [like.new_zeros(1, module.d_out) for module in modules])
        if embedding is not None and not width:
            _launch_embedding(items, embedding, like)


def _groups(base: BaseModel) -> list[Sequence[BaseModule]]:
    """Linear modules that a launch may be for, once for each shape.

    An adapter may leave out some of those that share an input. Which ones makes no difference, so the last.
    """
    modules = base.modules.by_path
    layers = () if base.decoder is None else base.decoder.layers
    whole = [[modules[m.path] for m in group.modules] for layer in layers for group in layer.groups]
    whole += [[module] for module in modules.values() if module.kind is not ModuleKind.EMBEDDING]
    parts = [group[:size] for group in whole for size in range(1, len(group) + 1)]
    return list({(part[0].d_in, *(module.d_out for module in part)): part for part in parts}.values())


def _make_parts(modules: Sequence[BaseModule], like: torch.Tensor) -> GroupParts:
    """One rank row of each module."""
    rows = [PartRows(like.new_zeros(1, m.d_in), None, like.new_zeros(1, m.d_out)) for m in modules]
    return GroupParts(rows, [0] * len(modules))


def _launch_embedding(items: RankItems, embedding: BaseModule, like: torch.Tensor) -> None:
    ids = torch.zeros(1, dtype=torch.long, device=like.device)
    items.add_embedded_(ids, _make_parts([embedding], like), like.new_zeros(1, embedding.d_out), 1.0)
