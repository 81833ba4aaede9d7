"""Pinned memory without a GPU: memory that is remembered to be some."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusionserve.adapters.lora_weights import ModuleLoRA


def count_pinned(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All that is pinned from here on."""
    pinned: list[Tensor] = []

    empty = torch.empty

    def make(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        made = empty(*size, **options)
        if pin_memory:
            pinned.append(made)
        return made

    monkeypatch.setattr(torch, "empty", make)
    return pinned


def is_pinned(tensor: Tensor | None, pinned: list[Tensor]) -> bool:
    """True for what `count_pinned` has seen, and for nothing."""
    return tensor is None or any(_begins_at(tensor) == _begins_at(other) for other in pinned)


def _begins_at(tensor: Tensor) -> int:
    """The address of the memory that it is a part of."""
    return tensor.untyped_storage().data_ptr()


def pin_rows(lora: ModuleLoRA) -> ModuleLoRA:
    """The same with its rank rows in pinned memory, where the loader puts them for a GPU."""
    bias = None if lora.shrink_bias is None else lora.shrink_bias.pin_memory()
    return replace(lora, shrink=lora.shrink.pin_memory(), expand=lora.expand.pin_memory(), shrink_bias=bias)
