"""The attention function that transformers' models call, and what it needs to know of the batch.

All requests' tokens come packed as one row `[1, num_tokens]`. Each layer's new keys and values are written to its slots
of the paged cache; then every request attends to its own slots. The batch travels as a keyword argument of the model
call, the cache of a layer is found by its attention module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fusionserve.kernels.paged_attention import (
    AttentionOptions,
    DecodeBatch,
    DecodingRequest,
    causal_mask,
    chunk_attention,
    slots_of_blocks,
)
from fusionserve.kernels.pointwise import Rotation, rotate_and_store

ATTENTION_NAME = "fusionserve_paged"


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one attention layer: [num_slots, kv_heads, dim] each."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """One request's part of the batch: tokens [start, end), the first at `position`, and the blocks of its context."""

    start: int
    end: int
    position: int
    blocks: Sequence[int]

    @property
    def num_tokens(self) -> int:
        """New tokens."""
        return self.end - self.start

    @property
    def length(self) -> int:
        """Positions up to the last new token's."""
        return self.position + self.num_tokens


class _Chunk:
    """Several new tokens of one request."""

    def __init__(self, sequence: PackedSequence, block_size: int, device: torch.device) -> None:
        self.tokens = slice(sequence.start, sequence.end)
        self.slots = slots_of_blocks(sequence.blocks, sequence.length, block_size, device)
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
    """The packed batch as attention sees it; what depends on the step alone is made once and shared by the layers."""

    def __init__(
        self,
        caches: Mapping[nn.Module, LayerCache],
        sequences: Sequence[PackedSequence],
        block_size: int,
        device: torch.device,
    ) -> None:
        self._caches = caches
        new_slots = [slot for sequence in sequences for slot in _new_slots(sequence, block_size)]
        self._new_slots = torch.tensor(new_slots, dtype=torch.long, device=device)  # [num_tokens]
        decoding = [DecodingRequest(s.start, s.length, s.blocks) for s in sequences if s.num_tokens == 1]
        self._decoding = DecodeBatch(decoding, block_size, device) if decoding else None
        self._chunks = [_Chunk(s, block_size, device) for s in sequences if s.num_tokens > 1]

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """query, key, value [num_tokens, heads, dim] of the new tokens -> [num_tokens, heads, dim]."""
        cache = self._caches[module]
        cache.keys[self._new_slots] = key
        cache.values[self._new_slots] = value
        return self._attend(cache, query.contiguous(), options)

    def rotate_and_attend(
        self,
        module: nn.Module,
        heads: tuple[Tensor, Tensor, Tensor],
        angles: tuple[Tensor, Tensor],
        options: AttentionOptions,
    ) -> Tensor:
        """The same for queries, keys and values that are still to be turned by cos and sin [num_tokens, dim]."""
        cache, rotation = self._caches[module], Rotation(*angles, self._new_slots)
        query = rotate_and_store(*heads, cache.keys, cache.values, rotation)
        return self._attend(cache, query, options)

    def _attend(self, cache: LayerCache, query: Tensor, options: AttentionOptions) -> Tensor:
        output = query.new_empty(query.shape[0], query.shape[1], cache.values.shape[-1])
        if self._decoding is not None:
            self._decoding.attend_(query, cache.keys, cache.values, options, output)
        for chunk in self._chunks:
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


def _new_slots(sequence: PackedSequence, block_size: int) -> Iterator[int]:
    """The slots of the new tokens."""
    for position in range(sequence.position, sequence.length):
        yield sequence.blocks[position // block_size] * block_size + position % block_size
