"""The one equation, natively: every token meets its own rank rows, of several modules at once.

    y_t += sum_j c_tj (A_j x_t + a_j) B_j          j over the rank rows of the token's segments

`low_rank.py` has the same sums as products over rectangles of tokens and rank rows, which pay for the largest.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionserve.kernels.native_call import Tokens, native_function


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [token_start, token_end) by rank rows [row_start, row_end), with a coefficient for each pair.

    `coefficients` is float32, [tokens, rows], or [1, rows] where all tokens share them. A coefficient of zero means
    exactly zero, whatever the input is. The values may change between calls, in place.
    """

    token_start: int
    token_end: int
    row_start: int
    row_end: int
    coefficients: Tensor


@dataclass(frozen=True, slots=True)
class PartRows:
    """A module's rank rows: shrink [capacity, d_in], bias [capacity] or None, expand [capacity, d_out]."""

    shrink: Tensor
    bias: Tensor | None
    expand: Tensor


class _Segment(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("token_start", "num_tokens", "row_start", "num_rows")),
        ("coefficients", c_void_p),
        ("coefficient_stride", c_int64),
    )


class _Part(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("shrink_rows", "shrink_bias", "expand_rows", "y")),
        *((name, c_int64) for name in ("d_out", "y_stride")),
    )


class Parts:
    """The rank rows of modules that share an input, as the kernel takes them; made once, used at every step."""

    def __init__(self, rows: Sequence[PartRows]) -> None:
        self.rows = tuple(rows)  # kept: the kernel has their addresses
        self._parts = (_Part * len(rows))(*map(_to_part, rows))

    def for_outputs(self, outputs: Sequence[Tensor]) -> ctypes.Array[_Part]:
        """The parts with the places of their outputs [num_tokens, d_out]."""
        for part, y in zip(self._parts, outputs, strict=True):
            assert y.shape[1] == part.d_out and y.stride(1) == 1
            part.y, part.y_stride = y.data_ptr(), y.stride(0)
        return self._parts


def can_add(like: Tensor) -> bool:
    """True if `Segments` can be added to tensors of this type and device."""
    return native_function("add_low_rank", like) is not None


class Segments:
    """All segments of a step. Made once, used by every module."""

    def __init__(self, segments: Sequence[Segment], like: Tensor) -> None:
        native = native_function("add_low_rank", like)
        assert native is not None, "segments need the native kernel"
        self._native = native
        self._dtype = like.dtype
        self._num_tokens = max((segment.token_end for segment in segments), default=0)
        self._kept = [segment.coefficients for segment in segments]  # the kernel has their addresses
        self._segments = (_Segment * len(segments))(*map(_to_native, segments))
        self._num_products = sum(s.num_tokens * s.num_rows for s in self._segments)
        self._workspace = torch.empty(0)

    def add_(self, x: Tensor, parts: Parts, outputs: Sequence[Tensor]) -> None:
        """y += their low-rank part, in place, for x [num_tokens, d_in] and the y [num_tokens, d_out] of each part."""
        for tensor in (x, *outputs):
            assert tensor.dtype == self._dtype and tensor.shape[0] >= self._num_tokens
        for rows in parts.rows:
            assert rows.shrink.dtype == self._dtype and rows.shrink.shape[1] == x.shape[1]
        if self._workspace.numel() < len(outputs) * self._num_products:
            self._workspace = torch.empty(len(outputs) * self._num_products)
        self._native(
            ctypes.byref(Tokens.of(x)),
            parts.for_outputs(outputs),
            c_int64(len(outputs)),
            self._segments,
            c_int64(len(self._segments)),
            c_void_p(self._workspace.data_ptr()),
        )


def _to_native(segment: Segment) -> _Segment:
    coefficients = segment.coefficients
    assert coefficients.dtype == torch.float32, "coefficients are float32"
    return _Segment(
        segment.token_start,
        segment.token_end - segment.token_start,
        segment.row_start,
        segment.row_end - segment.row_start,
        coefficients.data_ptr(),
        0 if coefficients.shape[0] == 1 else coefficients.stride(0),
    )


def _to_part(rows: PartRows) -> _Part:
    bias = None if rows.bias is None else rows.bias.data_ptr()
    d_out = rows.expand.shape[1]
    return _Part(rows.shrink.data_ptr(), bias, rows.expand.data_ptr(), None, d_out, d_out)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionAttention:
    """Where a fusion's scores come from: its rank rows from `row_start` and what they mean.

    First come the members' rows, `member_of_row` [rows] says whose; then as many of the scores; then, with
    `has_member_keys`, a row per member. `allowed` bool [members] or [tokens, members], None for all.
    """

    token_start: int
    token_end: int
    row_start: int
    member_of_row: Tensor
    num_members: int
    has_member_keys: bool
    has_base_member: bool
    allowed: Tensor | None


class _FusionAttention(ctypes.Structure):
    _fields_ = (
        ("shrink_rows", c_void_p),
        ("shrink_bias", c_void_p),
        *((n, c_int64) for n in ("token_start", "num_tokens", "row_start", "num_rows", "num_members")),
        ("member_of_row", c_void_p),
        ("allowed", c_void_p),
        *((n, c_int64) for n in ("allowed_stride", "has_member_keys", "has_base_member")),
        ("weights", c_void_p),
        ("coefficients", c_void_p),
    )


def attend_members(x: Tensor, rows: PartRows, fusion: FusionAttention, coefficients: Tensor) -> Tensor:
    """The fusion weights [tokens, members (+ 1)], float32, of x [num_tokens, d_in]'s fused tokens.

    Also fills `coefficients` [tokens, rows], float32: each rank row's member's weight.
    """
    native = native_function("fusion_attention", x)
    assert native is not None, "fused segments need the native kernel"
    assert rows.shrink.dtype == x.dtype and rows.shrink.shape[1] == x.shape[1]
    num_tokens, num_rows = coefficients.shape
    weights = coefficients.new_empty(num_tokens, fusion.num_members + fusion.has_base_member)
    allowed = fusion.allowed
    arguments = _FusionAttention(
        rows.shrink.data_ptr(),
        None if rows.bias is None else rows.bias.data_ptr(),
        fusion.token_start,
        num_tokens,
        fusion.row_start,
        num_rows,
        fusion.num_members,
        fusion.member_of_row.data_ptr(),
        None if allowed is None else allowed.data_ptr(),
        0 if allowed is None or allowed.dim() == 1 else allowed.stride(0),
        fusion.has_member_keys,
        fusion.has_base_member,
        weights.data_ptr(),
        coefficients.data_ptr(),
    )
    all_rows = 2 * num_rows + fusion.num_members
    workspace = coefficients.new_empty(num_tokens * all_rows)
    native(ctypes.byref(Tokens.of(x)), ctypes.byref(arguments), c_void_p(workspace.data_ptr()))
    return weights
