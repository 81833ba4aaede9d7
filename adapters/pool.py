"""The adapter pool: rank rows of A and B for every adapted module, on the device that computes.

A resident, an adapter or a fusion, has the same row range in every module, so a batch's rows are planned once per step
and not once per module. A module gets its tensors when the first resident that touches it is activated.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from fusionserve.adapters.base_modules import BaseModule, BaseModules, ModuleKind
from fusionserve.adapters.pool_ledger import MoveRows, PoolChange, WriteRows
from fusionserve.adapters.resident import Resident, RowPiece
from fusionserve.adapters.side_copies import Copies, CopyError, SideStream
from fusionserve.failpoints import reach_failpoint
from fusionserve.kernels.huge_pages import HugePages, touch_zeros
from fusionserve.kernels.low_rank import expand_, shrink
from fusionserve.kernels.rank_panels import Packing, has_panels, padded_shapes
from fusionserve.kernels.segments import PartRows
from fusionserve.kernels.torch_errors import is_device_lost


class ModuleRows:
    """The pool's rows for one module. Empty (`is_empty`) until an adapter that touches the module arrives."""

    def __init__(self, module: BaseModule, capacity: int, like: Tensor, pages: HugePages) -> None:
        self._module = module
        self._capacity = capacity
        self._like, self._pages = like, pages
        self._getting = threading.Lock()
        self._memory: tuple[Tensor, Tensor, Tensor] | None = None
        self.shrink_rows = self._like  # [capacity, d_in]
        self.shrink_bias = self._like  # [capacity]
        self.expand_rows = self._like  # [capacity, d_out]
        self._has_bias = False
        self._part: PartRows | None = None
        self._in_panels = module.kind is not ModuleKind.EMBEDDING and has_panels(module.d_in, like)
        self.layout = 0  # counts what changes the addresses that kernels are given

    @property
    def part(self) -> PartRows:
        """All rows, as the native kernels take them; they must not be empty."""
        if self._part is None:
            bias = self.shrink_bias if self._has_bias else None
            expand = self.expand_rows[:, : self._module.d_out]
            self._part = PartRows(self.shrink_rows, bias, expand, self._in_panels)
        return self._part

    @property
    def is_empty(self) -> bool:
        """True if no adapter has touched this module so far."""
        return self.shrink_bias.numel() == 0

    def shrink(self, x: Tensor, rows: slice) -> Tensor:
        """u = A x + a0 of these rows, [tokens, rows], for x [tokens, d_in]."""
        assert not self._in_panels, "rows in panels are for segments"
        bias = self.shrink_bias[rows] if self._has_bias else None
        return shrink(x, self.shrink_rows[rows], bias)

    def expand_(self, y: Tensor, weighted: Tensor, rows: slice) -> None:
        """y += w B of these rows, in place, for y [tokens, d_out], w [tokens, rows]."""
        assert not self._in_panels, "rows in panels are for segments"
        expand_(y, weighted, self.expand_rows[rows])

    def memory(self) -> tuple[Tensor, Tensor, Tensor]:
        """Zeros for shrink, its bias and expand, the same at every call. On any thread; raises MemoryError."""
        with self._getting:
            if self._memory is None:
                zeros, module = partial(self._pages.zeros, self._like), self._module
                shapes = (self._capacity, module.d_in), (self._capacity, module.d_out)
                if self._in_panels:
                    shapes = padded_shapes(self._capacity, module.d_in, module.d_out)
                tensors = zeros(*shapes[0]), zeros(self._capacity), zeros(*shapes[1])
                for tensor in tensors:
                    touch_zeros(tensor)
                self._memory = tensors
            return self._memory

    def make_ready(self, pieces: Sequence[RowPiece]) -> None:
        """Allocates what these pieces are the first to need."""
        if self.is_empty and pieces:
            self._allocate()
        if any(piece.shrink_bias is not None for piece in pieces):
            self._use_bias()

    def write(self, start: int, num_rows: int, pieces: Sequence[RowPiece], packing: Packing) -> None:
        """Sets rows [start, start + num_rows) to the pieces, zeros where there are none, by the end of `packing`."""
        self.make_ready(pieces)
        if self.is_empty:
            return
        rows = slice(start, start + num_rows)
        if self._has_bias:
            _fill_(self.shrink_bias[rows], [(piece.offset, piece.shrink_bias) for piece in pieces])
        if self._in_panels:
            packing.add(self._joined(pieces, num_rows), self.shrink_rows, self.expand_rows, start, num_rows)
        else:
            _fill_(self.shrink_rows[rows], [(piece.offset, piece.shrink) for piece in pieces])
            _fill_(self.expand_rows[rows], [(piece.offset, piece.expand) for piece in pieces])

    def _joined(self, pieces: Sequence[RowPiece], num_rows: int) -> tuple[Tensor, Tensor] | None:
        """All of a resident's rows, shrink and expand, in the pool's type: those of the only piece, if it has all."""
        if not pieces:
            return None
        first, module = pieces[0], self._module
        has_all = first.shrink.shape[0] == num_rows and first.shrink.dtype == self._like.dtype
        if first.expand is not None and has_all:
            return first.shrink.contiguous(), first.expand.contiguous()
        shrink, expand = (self._like.new_empty(num_rows, width) for width in (module.d_in, module.d_out))
        _fill_(shrink, [(piece.offset, piece.shrink) for piece in pieces])
        _fill_(expand, [(piece.offset, piece.expand) for piece in pieces])
        return shrink, expand

    def _use_bias(self) -> None:
        """From here on, and no sooner: adding zeros is right, and costs a quarter of a small product."""
        if not self._has_bias:
            self._has_bias, self._part = True, None
            self.layout += 1

    def move(self, source: int, target: int, num_rows: int) -> None:
        """Copies rows down; the ranges may overlap."""
        if self.is_empty:
            return
        for tensor in self._tensors:
            tensor[target : target + num_rows] = tensor[source : source + num_rows].clone()

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.shrink_rows, self.shrink_bias, self.expand_rows

    def _allocate(self) -> None:
        self.shrink_rows, self.shrink_bias, self.expand_rows = self.memory()
        self.layout += 1


def _fill_(rows: Tensor, pieces: Sequence[tuple[int, Tensor | None]]) -> None:
    """Sets rows to the pieces, each from its offset on, and to zeros where there are none."""
    there = [(offset, piece) for offset, piece in pieces if piece is not None]
    if sum(len(piece) for _, piece in there) < len(rows):
        rows.zero_()
    for offset, piece in there:
        rows[offset : offset + len(piece)].copy_(piece, non_blocking=True)


class AdapterPool:
    """The rows of all modules; changes come from the ledger and are applied between forward passes.

    `copies` carries out what is copied ahead; on a CPU there is none, and nothing is.
    """

    def __init__(
        self, modules: BaseModules, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        like, pages = torch.empty(0, dtype=dtype, device=device), HugePages()
        self._rows = {p: ModuleRows(module, capacity, like, pages) for p, module in modules.by_path.items()}
        self._on_host = device.type == "cpu"
        self.copies: Copies | None = SideStream(device) if device.type == "cuda" else None

    def rows(self, path: str) -> ModuleRows:
        """The rows of the module at `path`; the object stays the same for the pool's life."""
        return self._rows[path]

    def prepare(self, paths: Iterable[str]) -> None:
        """Gets the memory that a resident of these modules takes if it is the first, so that no step waits for it.

        On any thread, before the resident is asked for. Raises MemoryError. On a GPU it does nothing.
        """
        if self._on_host:
            for path in paths:
                self._rows[path].memory()

    def apply(self, changes: tuple[PoolChange, ...]) -> None:
        """Carries out the ledger's changes in order; what is computed from here on finds them made.

        Raises CopyError for the first resident that cannot be written, with all before it made and nothing behind it.
        """
        if not changes:
            return
        if self.copies is not None:
            self.copies.join()  # they may fill rows that are moved, or fill with other weights what is written here
        for change in changes:
            if isinstance(change, MoveRows):
                for rows in self._rows.values():
                    rows.move(change.source, change.target, change.num_rows)
            else:
                with _blaming(change.resident):
                    reach_failpoint("pool.activate")
                    self._write(change)

    def copy_ahead(self, writes: Sequence[WriteRows]) -> None:
        """Begins copies beside what is computed from here on. Raises CopyError for the first that cannot begin."""
        for write in writes:
            assert self.copies is not None, "nothing is copied ahead here"
            with _blaming(write.resident):
                self._copy_ahead(write, self.copies)

    @property
    def layout(self) -> int:
        """Another number whenever a module's rows lie elsewhere than before."""
        return sum(rows.layout for rows in self._rows.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all rows that are allocated."""
        tensors = [t for r in self._rows.values() for t in (r.shrink_rows, r.shrink_bias, r.expand_rows)]
        return sum(tensor.nbytes for tensor in tensors)

    def _write(self, write: WriteRows) -> None:
        packing = Packing()
        for path, rows in self._rows.items():
            rows.write(write.start, write.resident.num_rows, write.resident.pieces(path), packing)
        packing.run()

    def _copy_ahead(self, write: WriteRows, copies: Copies) -> None:
        reach_failpoint("pool.activate")
        # Here, because what the side stream allocates steps would find half made.
        for path, rows in self._rows.items():
            rows.make_ready(write.resident.pieces(path))
        copies.begin(write.resident.uid, partial(self._write, write))


@contextmanager
def _blaming(resident: Resident) -> Iterator[None]:
    """Whatever goes wrong in its block is told with the resident, but for the loss of the device."""
    try:
        yield
    except Exception as error:
        if is_device_lost(error):
            raise
        raise CopyError(resident) from error
