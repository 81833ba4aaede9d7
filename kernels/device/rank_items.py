"""A step's adapted tokens as the tables that the kernels read, and the launches.

    tiles   [num_tiles, 4]    first token, tokens (at most 16), first item, end item: what is added to the tokens
    items   [num_items, 6]    first token, tokens, first rank row in the pool, rank rows (at most 16), group or -1,
                              1 if they are the rows of a fusion's scores
    given   [num_items, 16, 16]  coefficients of tokens by rank rows; zero for those of a group, whose attention says
    groups  [num_groups, 5]   fusions: member rows, members, key rows, 1 with a base member, start in member_of_row
    fused   [num_fused, 4]    tokens of fusions: group or -1, first item, place in its items, members allowed (bits)

All int32 but `fused`, which is int64. The tables may be larger than what they hold: an item or tile of no tokens, and a
fused token of group -1, is passed over, so that a CUDA graph can be replayed on tables of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionserve.kernels.device.group_parts import MAX_PLACES, GroupParts, three
from fusionserve.kernels.device.member_kernels import weigh_kernel
from fusionserve.kernels.device.rank_kernels import expand_kernel, shrink_ids_kernel, shrink_kernel
from fusionserve.kernels.device.triton_use import dot_in_float32, num_programs

BLOCK = 16
_BLOCK_K, _BLOCK_N, _BLOCK_ROWS = 128, 128, 64
_SPLIT_WIDTH = 512  # inputs that one program sums over, at least
_MAX_SPLITS = 16


@dataclass(frozen=True, slots=True)
class RankTables:
    """The tables of the file's head, and for fusions what depends on the module as well.

    `attends` int32 and `present` int64, [num_groups, num_modules]: whether a group's attention is at the module, and
    which members adapt it, as bits.
    """

    tiles: Tensor
    items: Tensor
    given: Tensor
    groups: Tensor
    fused: Tensor
    member_of_row: Tensor
    attends: Tensor
    present: Tensor


def num_splits(d_in: int) -> int:
    """Partial sums of a shrink over so many inputs: enough programs for a few items, whatever the batch is."""
    return max(1, min(_MAX_SPLITS, d_in // _SPLIT_WIDTH))


class RankItems:
    """Adds the low-rank parts of one step to the modules' outputs.

    `fusion_width` is 0 without fusions, else a power of two that no fusion has more members than.
    """

    def __init__(
        self,
        tables: RankTables,
        like: Tensor,
        *,
        module_ids: Mapping[str, int],
        fusion_width: int,
    ) -> None:
        self.tables = tables
        self.module_ids = module_ids
        self._wide_dot = dot_in_float32(like)
        num_modules = len(module_ids)
        self._num_modules, self._fusion_width = num_modules, fusion_width
        num_items, num_fused = len(tables.items), len(tables.fused)
        scratch = torch.float32
        device = like.device
        self._attended = tables.given
        if fusion_width:
            self._attended = torch.zeros(MAX_PLACES * num_items * BLOCK * BLOCK, dtype=scratch, device=device)
        self._shares = torch.zeros(num_fused, max(fusion_width, 1), dtype=scratch, device=device)
        # Fusion weights by module and fused token, the base member's last.
        self.weights = torch.zeros(
            num_modules if fusion_width else 0, num_fused, fusion_width + 1, dtype=scratch, device=device
        )

    def begin_step(self) -> None:
        """Forgets the weights of the step before, which may be NaN: rows of zeros may meet them before an attention."""
        self._shares.zero_()

    def add_(self, x: Tensor, parts: GroupParts, outputs: Sequence[Tensor]) -> None:
        """y += its low-rank part for x [num_tokens, d_in] and each y [num_tokens, d_out], all contiguous."""
        assert x.is_contiguous() and all(y.is_contiguous() and len(y) == len(x) for y in outputs)
        assert x.shape[1] == parts.d_in and [y.shape[1] for y in outputs] == parts.d_outs
        splits = num_splits(parts.d_in)
        tables, num_items = self.tables, len(self.tables.items)
        u = self._scratch(parts.num_places * splits)
        shrink_kernel[(num_items, splits, parts.num_places)](
            x,
            u,
            tables.items,
            tables.attends,
            *three(parts.shrink),
            *three(parts.bias),
            parts.module_ids,
            parts.d_in,
            num_items,
            self._num_modules,
            SPLITS=splits,
            BLOCK_K=_BLOCK_K,
            WIDE_DOT=self._wide_dot,
        )
        if self._fusion_width:
            self._weigh(u, parts, splits)
        self._expand(u, parts, outputs, splits, self._attended, 1.0)

    def _scratch(self, num_sums: int) -> Tensor:
        """Of one group, for so many sums [num_items, 16, 16]: a prompt has thousands of items."""
        shape = num_sums, len(self.tables.items), BLOCK, BLOCK
        return torch.empty(shape, dtype=torch.float32, device=self._shares.device)

    def add_embedded_(self, ids: Tensor, part: GroupParts, y: Tensor, scale: float) -> None:
        """The same for one-hot inputs: token ids [num_tokens], y [num_tokens, hidden]; fusions do not embed."""
        num_items, vocab = len(self.tables.items), part.d_in
        u = self._scratch(1)
        shrink_ids_kernel[(num_items,)](ids, u, self.tables.items, part.shrink[0], part.bias[0], vocab)
        self._expand(u, part, [y], 1, self.tables.given, scale)

    def _weigh(self, u: Tensor, parts: GroupParts, splits: int) -> None:
        tables = self.tables
        weigh_kernel[(len(tables.fused),)](
            u,
            self._attended,
            self._shares,
            self.weights,
            tables.fused,
            tables.groups,
            tables.member_of_row,
            tables.attends,
            tables.present,
            parts.module_ids,
            len(tables.items),
            len(tables.fused),
            self._num_modules,
            PLACES=parts.num_places,
            SPLITS=splits,
            BLOCK_MEMBERS=self._fusion_width,
            BLOCK_ROWS=_BLOCK_ROWS,
        )

    def _expand(
        self,
        u: Tensor,
        parts: GroupParts,
        outputs: Sequence[Tensor],
        splits: int,
        attended: Tensor,
        scale: float,
    ) -> None:
        tables = self.tables
        grid = (len(tables.tiles), num_programs(max(parts.d_outs), _BLOCK_N), parts.num_places)
        expand_kernel[grid](
            u,
            tables.items,
            tables.tiles,
            tables.given,
            attended,
            *three(outputs),
            *three(parts.expand),
            *three(parts.d_outs),
            len(tables.items),
            scale,
            SPLITS=splits,
            BLOCK_N=_BLOCK_N,
            WIDE_DOT=self._wide_dot,
        )
