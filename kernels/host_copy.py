"""Between host and device without waiting: pinned memory, and an event behind what comes back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HostCopy:
    """A tensor on its way to the host, behind all that the device was given before and beside what it gets after."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.current_stream(tensor.device).record_event()

    def read(self) -> Tensor:
        """The tensor on the host; waits until it is there, and for nothing that was launched later."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor


def to_device(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers; nobody waits for a GPU."""
    return sent(torch.tensor(values, dtype=dtype), device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; from pinned memory, so that nobody waits for a GPU."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
