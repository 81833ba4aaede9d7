"""Lists of integers as tensors, several in every step: by way of an array, in a third of the time of `torch.tensor`."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from fusionserve.kernels.host_copy import sent

INT64 = "q"  # array's name for it


def index_tensor(values: Sequence[int], device: torch.device) -> Tensor:
    """An int64 tensor [values] on `device`, which is not waited for."""
    if not values:  # frombuffer refuses nothing
        return torch.empty(0, dtype=torch.long, device=device)
    return sent(torch.frombuffer(array(INT64, values), dtype=torch.long), device)
