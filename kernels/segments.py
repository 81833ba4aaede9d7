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
from fusionserve.kernels.rank_panels import has_panels


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [token_start, token_end) by rank rows [row_start, row_end), with a coefficient for each pair.

    They are the first rows of a resident that has `extent` of them.
    `coefficients` is float32, [tokens, rows], or [1, rows] where all tokens share them. A coefficient of zero means
    exactly zero, whatever the input is. The values may change between calls, in place.
    """

    token_start: int
    token_end: int
    row_start: int
    row_end: int
    extent: int
    coefficients: Tensor


@dataclass(frozen=True, slots=True)
class PartRows:
    """A module's rank rows: shrink [capacity, d_in], bias [capacity] or None, expand [capacity, d_out].

    With `in_panels` numbers lie as they are multiplied in pairs (`rank_panels.py`), and a row of expand may be wider.
    """

    shrink: Tensor
    bias: Tensor | None
    expand: Tensor
    in_panels: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionAttention:
    """Where a fusion's scores come from: its rank rows from `row_start` and what they mean.

    First come the members' rows, `member_of_row` [rows] says whose; then as many of the scores; then, with
    `has_member_keys`, a row per member; with padding they are `extent` rows. `allowed` bool [members] or
    [tokens, members], None for all.
    """

    token_start: int
    token_end: int
    row_start: int
    extent: int
    member_of_row: Tensor
    num_members: int
    has_member_keys: bool
    has_base_member: bool
    allowed: Tensor | None


class _FusionAttention(ctypes.Structure):
    _fields_ = (
        ("shrink_rows", c_void_p),
        ("shrink_bias", c_void_p),
        *((n, c_int64) for n in ("token_start", "num_tokens", "row_start", "num_rows", "extent")),
        ("num_members", c_int64),
        ("member_of_row", c_void_p),
        ("allowed", c_void_p),
        *((n, c_int64) for n in ("allowed_stride", "has_member_keys", "has_base_member")),
        ("weights", c_void_p),
        ("coefficients", c_void_p),
    )


class MemberAttention:
    """A fusion's attention at one module, for one step.

    When it runs, it writes `weights` [tokens, members (+ 1)] and each rank row's member's weight to `coefficients`
    [tokens, rows]; both float32.
    """

    def __init__(self, rows: PartRows, fusion: FusionAttention, coefficients: Tensor) -> None:
        num_tokens, num_rows = coefficients.shape
        self.weights = coefficients.new_empty(num_tokens, fusion.num_members + fusion.has_base_member)
        self._kept = rows, fusion, coefficients  # the kernel has their addresses
        bias, allowed = rows.bias, fusion.allowed
        self.arguments = _FusionAttention(
            rows.shrink.data_ptr(),
            None if bias is None else bias.data_ptr(),
            fusion.token_start,
            num_tokens,
            fusion.row_start,
            num_rows,
            fusion.extent,
            fusion.num_members,
            fusion.member_of_row.data_ptr(),
            None if allowed is None else allowed.data_ptr(),
            0 if allowed is None or allowed.dim() == 1 else allowed.stride(0),
            fusion.has_member_keys,
            fusion.has_base_member,
            self.weights.data_ptr(),
            coefficients.data_ptr(),
        )


@dataclass(frozen=True, slots=True)
class Addition:
    """Rank rows of modules, by the place of their output in the group, with the attentions at the first of them.

    Those set the coefficients of segments, which must be there whenever this is added.
    """

    rows: dict[int, PartRows]
    attentions: Sequence[MemberAttention] = ()


class _Part(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("shrink_rows", "shrink_bias", "expand_rows")),
        *((name, c_int64) for name in ("d_out", "place")),
    )


class NativeAddition(ctypes.Structure):
    """An addition as the kernels take it."""

    _fields_ = (
        ("attentions", ctypes.POINTER(_FusionAttention)),
        ("num_attentions", c_int64),
        ("parts", ctypes.POINTER(_Part)),
        ("num_parts", c_int64),
    )


class Additions:
    """What adapters add to the modules of a group, in order, as the kernels take it."""

    def __init__(self, additions: Sequence[Addition]) -> None:
        self.additions = tuple(additions)
        self.array = (NativeAddition * len(additions))(*map(_to_addition, additions))


def _to_addition(addition: Addition) -> NativeAddition:
    attentions, parts = addition.attentions, addition.rows
    return NativeAddition(
        (_FusionAttention * len(attentions))(*(attention.arguments for attention in attentions)),
        len(attentions),
        (_Part * len(parts))(*(_to_part(place, rows) for place, rows in parts.items())),
        len(parts),
    )


def _to_part(place: int, rows: PartRows) -> _Part:
    bias = None if rows.bias is None else rows.bias.data_ptr()
    return _Part(rows.shrink.data_ptr(), bias, rows.expand.data_ptr(), rows.expand.shape[1], place)


class NativeSegment(ctypes.Structure):
    """A segment as the kernels take it."""

    _fields_ = (
        *((name, c_int64) for name in ("token_start", "num_tokens", "row_start", "num_rows", "extent")),
        ("coefficients", c_void_p),
        ("coefficient_stride", c_int64),
    )


class _Additions(ctypes.Structure):
    _fields_ = (
        ("additions", ctypes.POINTER(NativeAddition)),
        ("num_additions", c_int64),
        ("segments", ctypes.POINTER(NativeSegment)),
        ("num_segments", c_int64),
    )


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
        self.array = (NativeSegment * len(segments))(*map(_to_native, segments))

    def add_(self, x: Tensor, additions: Additions, outputs: Sequence[Tensor]) -> None:
        """y += its low-rank part, in place, for x [num_tokens, d_in] and the outputs [num_tokens, d_out] of a group."""
        self.check(x, additions, outputs)
        pointers = (c_void_p * len(outputs))(*(y.data_ptr() for y in outputs))
        arguments = _Additions(additions.array, len(additions.array), self.array, len(self.array))
        self._native(ctypes.byref(Tokens.of(x)), pointers, ctypes.byref(arguments))

    def check(self, x: Tensor, additions: Additions, outputs: Sequence[Tensor]) -> None:
        """Asserts that kernels may be given these tensors, as `add_` has them."""
        assert x.dtype == self._dtype and x.shape[0] >= self._num_tokens
        for addition in additions.additions:
            for place, rows in addition.rows.items():
                y = outputs[place]
                assert y.dtype == rows.shrink.dtype == self._dtype and rows.shrink.shape[1] == x.shape[1]
                assert rows.in_panels == has_panels(x.shape[1], x)
                assert y.is_contiguous() and y.shape == (x.shape[0], rows.expand.shape[1])


def _to_native(segment: Segment) -> NativeSegment:
    coefficients = segment.coefficients
    assert coefficients.dtype == torch.float32, "coefficients are float32"
    return NativeSegment(
        segment.token_start,
        segment.token_end - segment.token_start,
        segment.row_start,
        segment.row_end - segment.row_start,
        segment.extent,
        coefficients.data_ptr(),
        0 if coefficients.shape[0] == 1 else coefficients.stride(0),
    )
