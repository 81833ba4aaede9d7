"""Pinned memory without a GPU: copies that remember being some."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def count_pinned(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All that is pinned from here on."""
    pinned: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return pinned


def is_pinned(tensor: Tensor | None, pinned: list[Tensor]) -> bool:
    """True for what `count_pinned` has seen, and for nothing."""
    return tensor is None or any(tensor is other for other in pinned)
