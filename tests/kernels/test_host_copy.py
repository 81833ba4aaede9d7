"""What goes between host and device arrives as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from device_kernels import DEVICE
from torch import Tensor

from fusionserve.kernels.host_copy import HostCopy, to_device
from fusionserve.kernels.index_tensor import index_tensor


@pytest.mark.gpu
def test_copies_are_of_what_was_there_when_they_were_asked_for() -> None:
    tensors = [torch.full((1000,), float(n), device=DEVICE) for n in range(4)]
    copies = [HostCopy(tensor) for tensor in tensors]
    if DEVICE.type == "cuda":  # on a CPU there is no copy
        for tensor in tensors:
            tensor.fill_(-1.0)
    for number, copy in enumerate(copies):
        assert copy.read().device.type == "cpu"
        assert copy.read().tolist() == [float(number)] * 1000


@pytest.mark.gpu
def test_numbers_come_with_their_type() -> None:
    on_device = to_device([[0.1, 0.2]], torch.float64, DEVICE)
    assert on_device.device.type == DEVICE.type and on_device.dtype is torch.float64
    assert on_device.tolist() == [[0.1, 0.2]]


@pytest.mark.parametrize(
    "make", [lambda gpu: to_device([1, 2], torch.long, gpu), lambda gpu: index_tensor([1, 2], gpu)]
)
def test_nobody_waits_for_what_is_sent(
    make: Callable[[torch.device], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Tensor] = []
    pinned = torch.tensor([1, 2])

    def to(tensor: Tensor, device: torch.device, *, non_blocking: bool = False) -> Tensor:
        assert tensor is pinned and device.type == "cuda" and non_blocking
        sent.append(tensor)
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned)
    monkeypatch.setattr(Tensor, "to", to)
    assert make(torch.device("cuda")) is sent[0]
