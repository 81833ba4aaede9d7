"""A batch's new tokens over a paged cache, made once per step and used by every layer.

On a GPU Triton reads the cache through block tables. Natively every new token attends by itself, over the blocks of
its request: what it gets does not depend on how its prompt was cut into chunks, nor on its company. With torch's
operations, requests with one new token are padded to groups and longer chunks go one by one.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusionserve.kernels.device.triton_use import uses_triton
from fusionserve.kernels.index_tensor import INT64, index_tensor
from fusionserve.kernels.layer_cache import MAX_NATIVE_DIM, LayerCache
from fusionserve.kernels.native_call import NativeFunction, native_function
from fusionserve.kernels.paged_attention import (
    AttentionOptions,
    causal_mask,
    chunk_attention,
    decode_attention,
)
from fusionserve.kernels.paged_sequence import PackedSequence

if TYPE_CHECKING:
    from fusionserve.kernels.device.paged_launch import DeviceQueries


class PagedBatch:
    """The new tokens of all requests, in the order in which they are packed."""

    def __init__(self, sequences: Sequence[PackedSequence], block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._decoding = [sequence for sequence in sequences if sequence.num_tokens == 1]
        self._chunked = [sequence for sequence in sequences if sequence.num_tokens > 1]
        slots = [slot for sequence in sequences for slot in sequence.new_slots(block_size)]
        self.new_slots = index_tensor(slots, device)  # [num_tokens]
        self._native: list[_NativeTokens] | None = None
        self._torch: list[_PaddedGroup | _Chunk] | None = None
        self._queries: DeviceQueries | None = None

    def attend(self, query: Tensor, cache: LayerCache, options: AttentionOptions) -> Tensor:
        """query [num_tokens, heads, dim], contiguous, over a cache that has the new tokens' keys and values.

        Returns [num_tokens, heads, value_dim].
        """
        keys, values = cache.keys, cache.values
        output = query.new_empty(query.shape[0], query.shape[1], values.shape[-1])
        if uses_triton(query.device):
            self._device_queries(query, keys).attend_(query, keys, values, options, output)
            return output
        fits = max(query.shape[-1], values.shape[-1]) <= MAX_NATIVE_DIM and query.shape[-1] % 2 == 0
        native = native_function("attend", query) if fits else None
        if native is not None:
            for tokens in self._native_tokens():
                tokens.attend_(native, query, cache, options, output)
        else:
            assert not cache.is_tiled, "tiles need the native kernels"
            for part in self._torch_parts():
                part.attend_(query, keys, values, options, output)
        return output

    def _device_queries(self, query: Tensor, keys: Tensor) -> DeviceQueries:
        if self._queries is None:
            from fusionserve.kernels.device.paged_launch import DeviceQueries

            sequences = self._decoding, self._chunked
            heads = query.shape[1], keys.shape[1]
            self._queries = DeviceQueries.make(*sequences, self._block_size, heads).to(self._device)
        return self._queries

    def native_attentions(self) -> list[NativeAttention]:
        """What the native kernels are told of the tokens; it lives as long as this batch."""
        return [tokens.arguments for tokens in self._native_tokens()]

    def _native_tokens(self) -> list[_NativeTokens]:
        if self._native is None:
            kinds = [(self._decoding, True), (self._chunked, False)]
            self._native = [
                _NativeTokens(some, self._block_size, are_single) for some, are_single in kinds if some
            ]
        return self._native

    def _torch_parts(self) -> list[_PaddedGroup | _Chunk]:
        if self._torch is None:
            groups = _group_by_length(self._decoding)
            self._torch = [
                *(_PaddedGroup(group, self._block_size, self._device) for group in groups),
                *(_Chunk(sequence, self._block_size, self._device) for sequence in self._chunked),
            ]
        return self._torch


class NativeAttention(ctypes.Structure):
    """Attention of some tokens as the kernels take it; a layer sets what is its own."""

    _fields_ = (
        *((n, c_void_p) for n in ("query", "keys", "values", "output")),
        *((n, c_void_p) for n in ("tokens", "blocks", "block_starts", "lengths", "sinks")),
        *((n, c_int64) for n in ("num_tokens", "num_heads", "num_kv_heads", "dim", "value_dim")),
        *((n, c_int64) for n in ("block_size", "are_single", "is_tiled", "window")),
        ("scale", c_float),
        ("softcap", c_float),
    )


def native_sinks(options: AttentionOptions, num_heads: int) -> int | None:
    """Where the sinks of so many heads lie, if there are any."""
    sinks = options.sinks
    if sinks is None:
        return None
    assert sinks.shape == (num_heads,) and sinks.dtype == torch.float32 and sinks.is_contiguous()
    return sinks.data_ptr()


class _NativeTokens:
    """Tokens, each with the positions it attends to; single ones are alone in their requests."""

    def __init__(self, sequences: Sequence[PackedSequence], block_size: int, are_single: bool) -> None:
        starts = accumulate((len(s.blocks) for s in sequences[:-1]), initial=0)
        indices = {
            "tokens": [token for s in sequences for token in range(s.start, s.end)],
            "blocks": [block for s in sequences for block in s.blocks],
            "block_starts": [
                start for s, start in zip(sequences, starts, strict=True) for _ in range(s.num_tokens)
            ],
            "lengths": [n for s in sequences for n in range(s.position + 1, s.length + 1)],
        }
        self._kept = {name: array(INT64, numbers) for name, numbers in indices.items()}
        self.arguments = NativeAttention(
            num_tokens=len(indices["tokens"]),
            block_size=block_size,
            are_single=are_single,
            **{name: numbers.buffer_info()[0] for name, numbers in self._kept.items()},
        )

    def attend_(
        self,
        native: NativeFunction,
        query: Tensor,
        cache: LayerCache,
        options: AttentionOptions,
        output: Tensor,
    ) -> None:
        keys, values = cache.keys, cache.values
        for tensor in (query, keys, values, output):
            assert tensor.dtype == query.dtype and tensor.is_contiguous()
        assert keys.shape[2] == query.shape[2] and query.shape[1] % keys.shape[1] == 0
        assert keys.shape[:2] == values.shape[:2]
        arguments = self.arguments
        arguments.query, arguments.keys = query.data_ptr(), keys.data_ptr()
        arguments.values, arguments.output = values.data_ptr(), output.data_ptr()
        arguments.num_heads, arguments.num_kv_heads = query.shape[1], keys.shape[1]
        arguments.dim, arguments.value_dim = keys.shape[2], values.shape[2]
        arguments.is_tiled = cache.is_tiled
        arguments.window, arguments.scale = options.sliding_window or 0, options.softmax_scale
        arguments.softcap = options.softcap or 0.0
        arguments.sinks = native_sinks(options, query.shape[1])
        native(ctypes.byref(arguments))


class _PaddedGroup:
    """Requests with one new token and contexts of similar length, padded to the longest."""

    def __init__(self, sequences: Sequence[PackedSequence], block_size: int, device: torch.device) -> None:
        self._tokens = torch.tensor([s.start for s in sequences], device=device)  # [requests]
        self._lengths = torch.tensor([s.length for s in sequences], device=device)  # [requests]
        # Padding repeats the request's own newest slot: masked, but read, so it must not be another request's.
        longest = max(s.length for s in sequences)
        slots = [slots_of_blocks(s.blocks, s.length, block_size, device) for s in sequences]
        self._slots = torch.stack([_pad(own, longest) for own in slots])  # [requests, context]
        self._masks: dict[int | None, Tensor] = {}

    def attend_(
        self, query: Tensor, keys: Tensor, values: Tensor, options: AttentionOptions, output: Tensor
    ) -> None:
        mask = self._mask(options.sliding_window)
        output[self._tokens] = decode_attention(query[self._tokens], keys, values, self._slots, mask, options)

    def _mask(self, sliding_window: int | None) -> Tensor:
        """[requests, context], True where the new token attends."""
        if sliding_window not in self._masks:
            positions = torch.arange(self._slots.shape[1], device=self._slots.device)[None, :]
            mask = positions < self._lengths[:, None]
            if sliding_window is not None:
                mask &= positions >= self._lengths[:, None] - sliding_window
            self._masks[sliding_window] = mask
        return self._masks[sliding_window]


class _Chunk:
    """Several new tokens of one request."""

    def __init__(self, sequence: PackedSequence, block_size: int, device: torch.device) -> None:
        self._tokens = slice(sequence.start, sequence.end)
        self._slots = slots_of_blocks(sequence.blocks, sequence.length, block_size, device)
        self._position = sequence.position
        self._masks: dict[int | None, Tensor | None] = {}

    def attend_(
        self, query: Tensor, keys: Tensor, values: Tensor, options: AttentionOptions, output: Tensor
    ) -> None:
        mask = self._mask(options.sliding_window)
        output[self._tokens] = chunk_attention(query[self._tokens], keys, values, self._slots, mask, options)

    def _mask(self, sliding_window: int | None) -> Tensor | None:
        """[tokens, context], or None where plain causal attention says the same."""
        if sliding_window not in self._masks:
            context, num_tokens = len(self._slots), self._tokens.stop - self._tokens.start
            is_plain = self._position == 0 and (sliding_window is None or context <= sliding_window)
            mask = None if is_plain else causal_mask(self._position, num_tokens, context, sliding_window)
            self._masks[sliding_window] = None if mask is None else mask.to(self._slots.device)
        return self._masks[sliding_window]


def slots_of_blocks(blocks: Sequence[int], length: int, block_size: int, device: torch.device) -> Tensor:
    """The slots [length] of a request's first `length` positions."""
    starts = torch.tensor(blocks, dtype=torch.long, device=device)[:, None] * block_size
    return (starts + torch.arange(block_size, device=device)).flatten()[:length]


def _group_by_length(sequences: Sequence[PackedSequence]) -> list[list[PackedSequence]]:
    """Groups whose padding at most doubles the shortest context (64 tokens are always fine)."""
    groups: list[list[PackedSequence]] = []
    for sequence in sorted(sequences, key=lambda sequence: sequence.length):
        if groups and sequence.length <= 2 * groups[-1][0].length + 64:
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return groups


def _pad(slots: Tensor, length: int) -> Tensor:
    return torch.cat([slots, slots[-1:].expand(length - len(slots))])
