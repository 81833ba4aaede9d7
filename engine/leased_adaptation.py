"""What a request is adapted with: leased adapters with coefficients, or one fusion with members left out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusionserve.adapters.adapter import Adapter
from fusionserve.adapters.resident import Resident
from fusionserve.fusion.fusion import Fusion
from fusionserve.generation import ResolvedAdaptation, ResolvedFusion, ResolvedMember


@dataclass(frozen=True, slots=True)
class LeasedAdaptation:
    """Fixed when the request is admitted. Base has neither adapters nor a fusion."""

    kind: str = "base"
    adapters: tuple[Adapter, ...] = ()
    coefficients: tuple[float, ...] = ()  # of each adapter's delta
    fusion: Fusion | None = None
    excluded: frozenset[int] = frozenset()  # indices of the fusion's members

    @property
    def residents(self) -> tuple[Resident, ...]:
        """What must be in the pool for the request to run."""
        return self.adapters if self.fusion is None else (self.fusion,)

    @property
    def cache_key(self) -> tuple[object, ...]:
        """What of it shapes the keys and values: uids, which no two versions share, with coefficients or the mask."""
        if self.fusion is not None:
            return ("fusion", self.fusion.uid, sorted(self.excluded))
        uids = (adapter.uid for adapter in self.adapters)
        return tuple(sorted(zip(uids, self.coefficients, strict=True)))

    @property
    def allowed_members(self) -> Tensor:
        """Which members of the fusion may take part, a bool [members]."""
        assert self.fusion is not None
        allowed = [index not in self.excluded for index in range(len(self.fusion.members))]
        return torch.tensor(allowed)

    def resolve(self) -> ResolvedAdaptation:
        """What the client is told of it, with versions and digests."""
        if self.fusion is None:
            pairs = zip(self.adapters, self.coefficients, strict=True)
            return ResolvedAdaptation(self.kind, tuple(_resolve(adapter, c) for adapter, c in pairs))
        members = tuple(
            _resolve(member, float(index not in self.excluded))
            for index, member in enumerate(self.fusion.members)
        )
        fusion = ResolvedFusion(self.fusion.name, self.fusion.version, self.fusion.digest)
        return ResolvedAdaptation(self.kind, members, fusion)


def _resolve(adapter: Adapter, scale: float) -> ResolvedMember:
    return ResolvedMember(adapter.name, adapter.version, adapter.digest, scale)
