"""The attention function that transformers' models call, and what it needs to know of the batch.

All requests' tokens come packed as one row `[1, num_tokens]`. Each layer's new keys and values are written to its slots
of the paged cache; then every request attends to its own slots. A model is called in the block of `attending_to` a
batch, because some do not hand on to their attention what they are called with. A layer's cache is found by its
attention module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from fusionserve.kernels.layer_cache import LayerCache
from fusionserve.kernels.native_layer import NativeStep
from fusionserve.kernels.paged_attention import AttentionOptions
from fusionserve.kernels.paged_batch import PagedBatch
from fusionserve.kernels.rotation import Angles, Rotation, rotate_and_store
from fusionserve.kernels.segments import Segments

if TYPE_CHECKING:
    from fusionserve.kernels.device.paged_launch import DeviceBatch

ATTENTION_NAME = "fusionserve_paged"


class Attends(Protocol):
    """What the attention function asks of a batch."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """query, key, value [num_tokens, heads, dim] of the new tokens -> [num_tokens, heads, dim]."""

    def pass_over(self, handed: Mapping[str, object]) -> None:
        """Told what a model hands its attention beside, by name; none of it is read."""


_batch: ContextVar[Attends] = ContextVar("_batch")


@contextmanager
def attending_to(batch: Attends) -> Iterator[None]:
    """Has the attention of models that are called in its block attend to a batch."""
    token = _batch.set(batch)
    try:
        yield
    finally:
        _batch.reset(token)


class AttentionBatch:
    """The packed batch as attention sees it; what depends on the step alone is made once and shared by the layers."""

    def __init__(self, caches: Mapping[nn.Module, LayerCache], paged: PagedBatch | DeviceBatch) -> None:
        self._caches = caches
        self._paged = paged

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """query, key, value [num_tokens, heads, dim] of the new tokens -> [num_tokens, heads, dim]."""
        cache = self._caches[module]
        cache.store_(self._paged.new_slots, key, value)
        return self._paged.attend(query.contiguous(), cache, options)

    def pass_over(self, handed: Mapping[str, object]) -> None:
        """`check_fit` has looked at it."""

    def cache_of(self, module: nn.Module) -> LayerCache:
        """The cache of an attention module."""
        return self._caches[module]

    def native_step(self, angles: Sequence[Angles], segments: Segments | None) -> NativeStep:
        """What native layers share."""
        assert isinstance(self._paged, PagedBatch)
        rotations = [Rotation(own, self._paged.new_slots) for own in angles]
        return NativeStep(rotations, self._paged.native_attentions(), segments)

    def rotate_and_attend(
        self,
        module: nn.Module,
        heads: tuple[Tensor, Tensor, Tensor],
        angles: Angles,
        options: AttentionOptions,
    ) -> Tensor:
        """The same for queries, keys and values that are still to be turned."""
        cache, rotation = self._caches[module], Rotation(angles, self._paged.new_slots)
        query = rotate_and_store(*heads, cache, rotation)
        return self._paged.attend(query, cache, options)


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, num_tokens, dim] -> ([1, num_tokens, heads, dim], None).

    `s_aux` [heads] are sinks. Raises LookupError outside of `attending_to`.
    """
    softmax_scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = None if s_aux is None else s_aux.detach().float().contiguous()
    options = AttentionOptions(softmax_scale, sliding_window, softcap, sinks)
    query, key, value = (heads_first[0].transpose(0, 1) for heads_first in (query, key, value))
    batch = _batch.get()
    batch.pass_over({"attention_mask": attention_mask, **others})
    return batch.attend(module, query, key, value, options)[None], None


def register_attention() -> None:
    """Makes the function known to transformers under ATTENTION_NAME."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention_forward)
