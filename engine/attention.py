"""The attention function that transformers' models call, and what it needs to know of the batch.

All requests' tokens come packed as one row `[1, num_tokens]`. Each layer's new keys and values are written to its slots
of the paged cache; then every request attends to its own slots. The batch travels as a keyword argument of the model
call, the cache of a layer is found by its attention module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fusionserve.kernels.paged_attention import (
    AttentionOptions,
    causal_mask,
    chunk_attention,
    decode_attention,
)

ATTENTION_NAME = "fusionserve_paged"


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one attention layer: [num_slots, kv_heads, dim] each."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """One request's part of the batch: tokens [start, end), the first at `position`, and the slots of its context."""

    start: int
    end: int
    position: int
    slots: Tensor  # [context], context = position + end - start


class _DecodeGroup:
    """Requests with one new token and contexts of similar length, padded to the longest."""

    def __init__(self, sequences: Sequence[PackedSequence]) -> None:
        self.tokens = torch.tensor([sequence.start for sequence in sequences])  # [requests]
        self._lengths = torch.tensor([len(sequence.slots) for sequence in sequences])  # [requests]
        # Padding repeats the request's own newest slot: masked, but read, so it must not be another request's.
        longest = int(self._lengths.max())
        self.slots = torch.stack(
            [_pad(sequence.slots, longest) for sequence in sequences]
        )  # [requests, context]
        self._masks: dict[int | None, Tensor] = {}

    def mask(self, sliding_window: int | None) -> Tensor:
        """[requests, context], True where the new token attends."""
        if sliding_window not in self._masks:
            positions = torch.arange(self.slots.shape[1])[None, :]
            mask = positions < self._lengths[:, None]
            if sliding_window is not None:
                mask &= positions >= self._lengths[:, None] - sliding_window
            self._masks[sliding_window] = mask
        return self._masks[sliding_window]


class _Chunk:
    """Several new tokens of one request."""

    def __init__(self, sequence: PackedSequence) -> None:
        self.tokens = slice(sequence.start, sequence.end)
        self.slots = sequence.slots
        self._position = sequence.position
        self._masks: dict[int | None, Tensor | None] = {}

    def mask(self, sliding_window: int | None) -> Tensor | None:
        """[tokens, context], or None where plain causal attention says the same."""
        if sliding_window not in self._masks:
            context, num_tokens = len(self.slots), self.tokens.stop - self.tokens.start
            is_plain = self._position == 0 and (sliding_window is None or context <= sliding_window)
            mask = None if is_plain else causal_mask(self._position, num_tokens, context, sliding_window)
            self._masks[sliding_window] = mask
        return self._masks[sliding_window]


class AttentionBatch:
    """The packed batch as attention sees it; masks are made once per step and shared by the layers."""

    def __init__(self, caches: Mapping[nn.Module, LayerCache], sequences: Sequence[PackedSequence]) -> None:
        self._caches = caches
        self.new_slots = torch.cat(
            [sequence.slots[sequence.position :] for sequence in sequences]
        )  # [num_tokens]
        decoding = [sequence for sequence in sequences if sequence.end - sequence.start == 1]
        self.decode_groups = [_DecodeGroup(group) for group in _group_by_length(decoding)]
        self.chunks = [_Chunk(sequence) for sequence in sequences if sequence.end - sequence.start > 1]

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """query, key, value [num_tokens, heads, dim] of the new tokens -> [num_tokens, heads, dim]."""
        cache = self._caches[module]
        cache.keys[self.new_slots] = key
        cache.values[self.new_slots] = value
        output = query.new_empty(query.shape[0], query.shape[1], value.shape[-1])
        for group in self.decode_groups:
            mask = group.mask(options.sliding_window)
            output[group.tokens] = decode_attention(
                query[group.tokens], cache.keys, cache.values, group.slots, mask, options
            )
        for chunk in self.chunks:
            output[chunk.tokens] = chunk_attention(
                query[chunk.tokens],
                cache.keys,
                cache.values,
                chunk.slots,
                chunk.mask(options.sliding_window),
                options,
            )
        return output


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    attention_batch: AttentionBatch,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, num_tokens, dim] -> ([1, num_tokens, heads, dim], None)."""
    softmax_scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = AttentionOptions(softmax_scale, sliding_window, softcap)
    query, key, value = (heads_first[0].transpose(0, 1) for heads_first in (query, key, value))
    output = attention_batch.attend(module, query, key, value, options)
    return output[None], None


def register_attention() -> None:
    """Makes the function known to transformers under ATTENTION_NAME."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention_forward)


def _group_by_length(sequences: Sequence[PackedSequence]) -> list[list[PackedSequence]]:
    """Groups whose padding at most doubles the shortest context (64 tokens are always fine)."""
    groups: list[list[PackedSequence]] = []
    for sequence in sorted(sequences, key=lambda sequence: len(sequence.slots)):
        if groups and len(sequence.slots) <= 2 * len(groups[-1][0].slots) + 64:
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return groups


def _pad(slots: Tensor, length: int) -> Tensor:
    return torch.cat([slots, slots[-1:].expand(length - len(slots))])
