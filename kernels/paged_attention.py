"""Attention over a paged key-value cache, grouped-query heads included.

    o_t = softmax_j(scale * q_t . k_j) v_j     over the cached positions j <= t of the token's own request,
                                               j > t - window where there is a sliding window;
    with soft-capping the score s becomes cap * tanh(s / cap).

K and V of a layer are flat arrays of slots, [num_slots, kv_heads, dim]; a request's slots are those of its blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from fusionserve.kernels.native_call import NativeFunction, native_function

_MAX_NATIVE_DIM = 256


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What a layer adds to plain attention: `softmax_scale`, and maybe a sliding window and a soft cap."""

    softmax_scale: float
    sliding_window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class DecodingRequest:
    """One new token: its place in the batch, the positions it attends to (its own is the last), and their blocks."""

    token: int
    length: int
    blocks: Sequence[int]


class DecodeBatch:
    """Requests with one new token each, over one paged cache; made once per step and used by every layer."""

    def __init__(self, requests: Sequence[DecodingRequest], block_size: int, device: torch.device) -> None:
        self._requests = tuple(requests)
        self._block_size = block_size
        self._device = device
        self.tokens = self._indices([request.token for request in requests])  # [requests]
        self._lengths = self._indices([request.length for request in requests])  # [requests]
        self._blocks = self._indices([block for request in requests for block in request.blocks])
        starts = accumulate((len(request.blocks) for request in requests[:-1]), initial=0)
        self._block_starts = self._indices(list(starts))  # [requests], in _blocks
        self._groups: list[_PaddedGroup] | None = None

    def attend_(
        self, query: Tensor, keys: Tensor, values: Tensor, options: AttentionOptions, output: Tensor
    ) -> None:
        """Fills the rows of these requests' tokens in `output` [num_tokens, heads, value_dim].

        query [num_tokens, heads, dim], contiguous like the output.
        """
        native = self._native(query, values)
        if native is not None:
            native(ctypes.byref(self._arguments(query, keys, values, options, output)))
            return
        for group in self._padded_groups():
            mask = group.mask(options.sliding_window)
            output[group.tokens] = decode_attention(
                query[group.tokens], keys, values, group.slots, mask, options
            )

    def _native(self, query: Tensor, values: Tensor) -> NativeFunction | None:
        fits = max(query.shape[-1], values.shape[-1]) <= _MAX_NATIVE_DIM
        return native_function("attend", query) if fits else None

    def _arguments(
        self, query: Tensor, keys: Tensor, values: Tensor, options: AttentionOptions, output: Tensor
    ) -> _Attention:
        tensors = (query, keys, values, output, self.tokens, self._blocks, self._block_starts, self._lengths)
        return _Attention(
            *(tensor.data_ptr() for tensor in tensors),
            len(self._requests),
            query.shape[1],
            keys.shape[1],
            keys.shape[2],
            values.shape[2],
            self._block_size,
            options.sliding_window or 0,
            options.softmax_scale,
            options.softcap or 0.0,
        )

    def _padded_groups(self) -> list[_PaddedGroup]:
        if self._groups is None:
            groups = _group_by_length(self._requests)
            self._groups = [_PaddedGroup(group, self._block_size, self._device) for group in groups]
        return self._groups

    def _indices(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self._device)


class _Attention(ctypes.Structure):
    _fields_ = (
        *((n, c_void_p) for n in ("query", "keys", "values", "output")),
        *((n, c_void_p) for n in ("tokens", "blocks", "block_starts", "lengths")),
        *((n, c_int64) for n in ("num_requests", "num_heads", "num_kv_heads", "dim", "value_dim")),
        *((n, c_int64) for n in ("block_size", "window")),
        ("scale", c_float),
        ("softcap", c_float),
    )


class _PaddedGroup:
    """Requests with contexts of similar length, padded to the longest, for torch's operations."""

    def __init__(self, requests: Sequence[DecodingRequest], block_size: int, device: torch.device) -> None:
        self.tokens = torch.tensor([request.token for request in requests], device=device)  # [requests]
        self._lengths = torch.tensor([request.length for request in requests], device=device)  # [requests]
        # Padding repeats the request's own newest slot: masked, but read, so it must not be another request's.
        longest = max(request.length for request in requests)
        slots = [slots_of_blocks(request.blocks, request.length, block_size, device) for request in requests]
        self.slots = torch.stack([_pad(own, longest) for own in slots])  # [requests, context]
        self._masks: dict[int | None, Tensor] = {}

    def mask(self, sliding_window: int | None) -> Tensor:
        """[requests, context], True where the new token attends."""
        if sliding_window not in self._masks:
            positions = torch.arange(self.slots.shape[1], device=self.slots.device)[None, :]
            mask = positions < self._lengths[:, None]
            if sliding_window is not None:
                mask &= positions >= self._lengths[:, None] - sliding_window
            self._masks[sliding_window] = mask
        return self._masks[sliding_window]


def slots_of_blocks(blocks: Sequence[int], length: int, block_size: int, device: torch.device) -> Tensor:
    """The slots [length] of a request's first `length` positions."""
    starts = torch.tensor(blocks, dtype=torch.long, device=device)[:, None] * block_size
    return (starts + torch.arange(block_size, device=device)).flatten()[:length]


def _group_by_length(requests: Sequence[DecodingRequest]) -> list[list[DecodingRequest]]:
    """Groups whose padding at most doubles the shortest context (64 tokens are always fine)."""
    groups: list[list[DecodingRequest]] = []
    for request in sorted(requests, key=lambda request: request.length):
        if groups and request.length <= 2 * groups[-1][0].length + 64:
            groups[-1].append(request)
        else:
            groups.append([request])
    return groups


def _pad(slots: Tensor, length: int) -> Tensor:
    return torch.cat([slots, slots[-1:].expand(length - len(slots))])


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, mask: Tensor, options: AttentionOptions
) -> Tensor:
    """One query token per request, over padded slot lists.

    query [requests, heads, dim], keys and values [num_slots, kv_heads, dim], slots [requests, context],
    mask [requests, context] (True: attend) -> [requests, heads, dim]. The query heads that share a KV head are laid
    out as query rows, so K and V are never repeated.
    """
    num_requests, num_heads, dim = query.shape
    num_kv_heads = keys.shape[1]
    grouped = query.view(num_requests, num_kv_heads, num_heads // num_kv_heads, dim)
    output = _attend(
        grouped, keys[slots].transpose(1, 2), values[slots].transpose(1, 2), mask[:, None, None, :], options
    )
    return output.reshape(num_requests, num_heads, values.shape[-1])


def chunk_attention(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """The last `tokens` positions of one request, over all its slots.

    query [tokens, heads, dim], slots [context], mask [tokens, context] or None for plain causal with no earlier
    context -> [tokens, heads, dim].
    """
    num_groups = query.shape[1] // keys.shape[1]
    k = keys[slots].repeat_interleave(num_groups, dim=1).transpose(0, 1)[None]
    v = values[slots].repeat_interleave(num_groups, dim=1).transpose(0, 1)[None]
    output = _attend(query.transpose(0, 1)[None], k, v, mask, options)
    return output[0].transpose(0, 1)


def causal_mask(query_start: int, num_tokens: int, context: int, sliding_window: int | None) -> Tensor:
    """[num_tokens, context], True where position query_start + t may attend to position j."""
    positions = torch.arange(query_start, query_start + num_tokens)[:, None]
    others = torch.arange(context)[None, :]
    mask = others <= positions
    if sliding_window is not None:
        mask &= others > positions - sliding_window
    return mask


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """query [batch, heads, tokens, dim]; mask broadcasts to [batch, heads, tokens, context], None is causal."""
    if options.softcap is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=options.softmax_scale
        )
    return _softcapped_attention(query, key, value, mask, options.softmax_scale, options.softcap)


def _softcapped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    if mask is None:
        mask = causal_mask(0, query.shape[-2], key.shape[-2], None).to(query.device)
    scores = torch.tanh(query @ key.transpose(-1, -2) * scale / softcap) * softcap
    scores = scores.float().masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1).to(value.dtype) @ value


def reference_attention(
    query: Tensor, keys: Tensor, values: Tensor, query_start: int, options: AttentionOptions
) -> Tensor:
    """The definition for one request, head by head and token by token; keys and values [context, kv_heads, dim]."""
    num_tokens, num_heads, _ = query.shape
    output = query.new_empty(num_tokens, num_heads, values.shape[-1])
    for token in range(num_tokens):
        position = query_start + token
        first = 0 if options.sliding_window is None else max(0, position - options.sliding_window + 1)
        for head in range(num_heads):
            kv_head = head * keys.shape[1] // num_heads
            scores = keys[first : position + 1, kv_head] @ query[token, head] * options.softmax_scale
            if options.softcap is not None:
                scores = torch.tanh(scores / options.softcap) * options.softcap
            output[token, head] = torch.softmax(scores, 0) @ values[first : position + 1, kv_head]
    return output
