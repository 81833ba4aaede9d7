"""The launches of a product with weights of 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionserve.kernels.device.few_bits_kernels import (
    join_ranges_kernel,
    multiply_kernel,
    round_inputs_kernel,
)
from fusionserve.kernels.device.group_parts import MAX_PLACES, three
from fusionserve.kernels.device.triton_use import num_programs
from fusionserve.kernels.quantized_linear import GROUP, LEAST, QuantizedLinear

_OUTPUTS = 128  # of a program
_ENOUGH_PROGRAMS = 256  # to keep the memory of a large GPU busy
_MAX_SPLITS = 8
_LEAST_GROUPS = 8  # that a range is worth a program for
_BLOCK_GROUPS = 32
_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class FewBitsWeights:
    """The weights of modules that share an input, by module; `tiled_linear.py` has their layout."""

    bits: int
    num_groups: int
    levels: Sequence[Tensor]
    scales: Sequence[Tensor]
    bias: Sequence[Tensor]
    d_outs: Sequence[int]

    @classmethod
    def of(cls, modules: Sequence[QuantizedLinear]) -> FewBitsWeights:
        """Those of modules with as many bits and inputs."""
        assert 1 <= len(modules) <= MAX_PLACES
        first = modules[0]
        assert all((m.bits, m.in_features) == (first.bits, first.in_features) for m in modules)
        like = next((m.bias for m in modules if m.bias is not None), first.scales)
        return cls(
            bits=first.bits,
            num_groups=first.in_features // GROUP,
            levels=[m.levels for m in modules],
            scales=[m.scales for m in modules],
            bias=[like.new_zeros(m.out_features) if m.bias is None else m.bias for m in modules],
            d_outs=[m.out_features for m in modules],
        )

    @property
    def num_blocks(self) -> int:
        """Blocks of outputs, of all modules."""
        return sum(num_programs(d_out, _OUTPUTS) for d_out in self.d_outs)

    @property
    def splits(self) -> int:
        """Ranges that sums are made of: so many that single tokens keep the device busy, whatever the batch is."""
        splits = 1
        while (
            splits < _MAX_SPLITS
            and splits * self.num_blocks < _ENOUGH_PROGRAMS
            and self.num_groups >= 2 * splits * _LEAST_GROUPS
        ):
            splits *= 2
        return splits


@dataclass(frozen=True, slots=True)
class _Tile:
    """Tokens of a program, its warps, and the lines it asks for ahead: what fits Hopper's registers."""

    tokens: int
    num_warps: int
    stages: int

    @classmethod
    def of(cls, num_tokens: int) -> _Tile:
        if num_tokens <= 16:
            return cls(16, 2, 6)
        return cls(32, 2, 4) if num_tokens <= 32 else cls(64, 4, 3)


def multiply(x: Tensor, weights: FewBitsWeights, outputs: Sequence[Tensor], *, add: bool) -> None:
    """Writes x W^T + b to each module's output [num_tokens, d_out], or adds it; x [num_tokens, d_in].

    All are contiguous, and outputs of x's type.
    """
    num_tokens, places, splits = len(x), len(outputs), weights.splits
    assert x.is_contiguous() and x.shape[1] == weights.num_groups * GROUP and x.numel() < 1 << 31
    for y, d_out in zip(outputs, weights.d_outs, strict=True):
        assert y.is_contiguous() and y.shape == (num_tokens, d_out) and y.dtype is x.dtype
    if not num_tokens:
        return
    levels, token_scales = _rounded(x, weights.num_groups)
    tile = _Tile.of(num_tokens)
    rows = num_programs(num_tokens, tile.tokens)
    blocks = num_programs(max(weights.d_outs), _OUTPUTS)
    sharers = splits if is_shared(splits, rows * weights.num_blocks) else 1
    parts = token_scales.new_empty(places * sharers if sharers > 1 else 0, num_tokens, blocks * _OUTPUTS)
    multiply_kernel[(rows, blocks, places * sharers)](
        levels,
        token_scales,
        parts,
        *three(outputs),
        *three(weights.levels),
        *three(weights.scales),
        *three(weights.bias),
        *three(weights.d_outs),
        num_tokens,
        weights.num_groups,
        BITS=weights.bits,
        BY_WORDS=x.device.type != "cpu",
        SPLITS=splits,
        SHARERS=sharers,
        ADD=add,
        TOKENS=tile.tokens,
        OUTPUTS=_OUTPUTS,
        STAGES=tile.stages,
        num_warps=tile.num_warps,
    )
    if sharers > 1:
        join_ranges_kernel[(num_tokens, num_programs(max(weights.d_outs), _BLOCK), places)](
            parts,
            *three(outputs),
            *three(weights.bias),
            *three(weights.d_outs),
            num_tokens,
            blocks * _OUTPUTS,
            SPLITS=splits,
            ADD=add,
            BLOCK=_BLOCK,
        )


def is_shared(splits: int, num_programs: int) -> bool:
    """True if the ranges of a sum get programs of their own, because `num_programs` would leave a device idle."""
    return splits > 1 and num_programs < _ENOUGH_PROGRAMS


def _rounded(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Levels [groups, num_tokens, 32] and scales [groups, num_tokens] of x [num_tokens, d_in]."""
    levels = torch.empty(num_groups, len(x), GROUP, dtype=torch.int8, device=x.device)
    scales = torch.empty(num_groups, len(x), dtype=torch.float32, device=x.device)
    round_inputs_kernel[(len(x), num_programs(num_groups, _BLOCK_GROUPS))](
        x,
        levels,
        scales,
        len(x),
        num_groups,
        LEAST=LEAST,
        BLOCK_GROUPS=_BLOCK_GROUPS,
        enable_fp_fusion=False,
    )
    return levels, scales
