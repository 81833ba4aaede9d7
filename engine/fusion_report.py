"""Gathers the fusion weights of one candidate, step by step, for the report its client asked for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusionserve.engine.fused_weights import ChunkWeights
from fusionserve.generation import (
    FusionWeightDetail,
    FusionWeights,
    ModuleFusionWeights,
    TokenFusionWeights,
)


class FusionReport:
    """Sums by attention, and rows by token if the `detail` asks for them.

    A position that is computed again after a preemption counts once.
    """

    def __init__(self, detail: FusionWeightDetail) -> None:
        self._detail = detail
        self._modules: tuple[str, ...] = ()
        self._sums: Tensor | None = None  # [attentions, members (+ 1)], float64
        self._num_tokens = 0
        self._tokens: list[TokenFusionWeights] = []
        self._num_told = 0

    def add(self, chunk: ChunkWeights, start: int) -> None:
        """Adds the weights of tokens from position `start` on; those known before are skipped."""
        num_known = max(0, self._num_tokens - start)
        if num_known >= chunk.num_tokens:
            return
        new = chunk.part(num_known)
        self._modules = new.modules
        sums = new.by_module.double().sum(dim=1)
        self._sums = sums if self._sums is None else self._sums + sums
        if self._detail is FusionWeightDetail.PER_TOKEN:
            rows = enumerate(new.mean.tolist(), start=self._num_tokens)
            self._tokens += [TokenFusionWeights(position, tuple(row)) for position, row in rows]
        self._num_tokens += new.num_tokens

    def take_untold(self) -> tuple[TokenFusionWeights, ...]:
        """The rows of the tokens added since the last call; none unless the detail is PER_TOKEN."""
        untold = tuple(self._tokens[self._num_told :])
        self._num_told = len(self._tokens)
        return untold

    def finish(self, members: Sequence[str]) -> FusionWeights | None:
        """The report; None if no token was computed."""
        if self._sums is None:
            return None
        means = self._sums / self._num_tokens
        modules: tuple[ModuleFusionWeights, ...] = ()
        if self._detail is FusionWeightDetail.PER_MODULE:
            rows = zip(self._modules, means.tolist(), strict=True)
            modules = tuple(ModuleFusionWeights(path, tuple(row)) for path, row in rows)
        return FusionWeights(
            members=tuple(members),
            mean=tuple(means.mean(dim=0).tolist()),
            tokens=tuple(self._tokens),
            modules=modules,
        )
