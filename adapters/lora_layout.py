"""Where an adapter's rank rows lie, side by side in one piece of memory, and the copies that bring them there.

It follows from the file's header and the plan alone, so fine-tunes that share these are read without a look at their
tensors one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from fusionserve.adapters.lora_plan import LoRAPlan, TensorRole
from fusionserve.adapters.safetensors_file import TensorSpec, WeightsHeader
from fusionserve.kernels.measured_copy import Copy, MeasuredCopies

_LINE_BYTES = 64
_KEPT_LAYOUTS = 4


@dataclass(frozen=True, slots=True, eq=False)
class RowPlace:
    """Of one module: the first numbers of shrink [num_rows, d_in], expand [num_rows, d_out], shrink_bias [num_rows]."""

    shrink: int
    expand: int
    shrink_bias: int | None  # None: it has none


@dataclass(frozen=True, slots=True, eq=False)
class BlockLayout:
    """Of one block of the file: the tensors that become rank rows with their copies, and those that are kept alone."""

    start: int  # of its bytes in the file's data
    copied: Sequence[TensorSpec]
    copies: MeasuredCopies
    others: Sequence[TensorSpec]


@dataclass(frozen=True, slots=True, eq=False)
class LoRALayout:
    """All modules' rank rows, from the beginning of a line each, in `num_numbers` numbers; blocks in file order."""

    num_numbers: int
    places: Mapping[str, RowPlace]  # by module path
    blocks: Sequence[BlockLayout]


@lru_cache(_KEPT_LAYOUTS)
def lay_out(header: WeightsHeader, plan: LoRAPlan, dtype: torch.dtype) -> LoRALayout:
    """For rank rows of `dtype`; a row of a bias is behind the module's others."""
    places, end, line = {}, 0, _LINE_BYTES // dtype.itemsize
    for path, module in plan.modules.items():
        expand = end + _round_up(module.num_rows * module.module.d_in, line)
        behind = expand + _round_up(module.num_rows * module.module.d_out, line)
        has_bias = TensorRole.BIAS in module.parts
        places[path] = RowPlace(end, expand, behind if has_bias else None)
        end = behind + _round_up(module.num_rows if has_bias else 0, line)
    blocks = tuple(_lay_out_block(block, plan, places, dtype) for block in header.blocks)
    return LoRALayout(end, places, blocks)


def _lay_out_block(
    block: Sequence[TensorSpec], plan: LoRAPlan, places: Mapping[str, RowPlace], dtype: torch.dtype
) -> BlockLayout:
    start = block[0].start
    copies = {spec: copy for spec in block if (copy := _to_copy(spec, start, plan, places, dtype))}
    others = tuple(spec for spec in block if spec not in copies)
    return BlockLayout(start, tuple(copies), MeasuredCopies(tuple(copies.values())), others)


def _to_copy(
    spec: TensorSpec, block_start: int, plan: LoRAPlan, places: Mapping[str, RowPlace], dtype: torch.dtype
) -> Copy | None:
    """A as it is, B and its bias times the scaling; None for what are no rank rows."""
    path, role = plan.places[spec.name]
    if path not in places:
        return None
    module, place = plan.modules[path], places[path]
    rank, d_in, d_out = module.rank, module.module.d_in, module.module.d_out
    match role:
        case TensorRole.SHRINK:
            start, rows, columns, scale = place.shrink, rank * d_in, 1, 1.0
        case TensorRole.EXPAND:
            start, rows, columns, scale = place.expand, d_out, rank, module.scaling
        case TensorRole.BIAS:
            start, rows, columns, scale = place.expand + rank * d_out, d_out, 1, module.scaling
        case _:
            return None
    return Copy(
        source=spec.start - block_start,
        target=start * dtype.itemsize,
        source_dtype=spec.dtype,
        target_dtype=dtype,
        num_rows=rows,
        num_columns=columns,
        scale=scale,
    )


def _round_up(number: int, to: int) -> int:
    return -(-number // to) * to
