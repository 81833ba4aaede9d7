"""Gives back the memory that loading a base leaves behind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fusionserve import heap

_MOST_KEPT = 32 << 20


@contextmanager
def little_garbage() -> Iterator[None]:
    """Lets weights that are freed while a base is converted go back to the system at once.

    Else glibc soon keeps blocks of up to 32 MiB for later, and several times the size of the base lies about in holes.
    That is the size at which it stands behind the block, as it does in any process that has freed large blocks.
    """
    heap.set_option(heap.MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        heap.set_option(heap.MMAP_THRESHOLD, _MOST_KEPT)
        heap.set_option(heap.TRIM_THRESHOLD, 2 * _MOST_KEPT)


@torch.no_grad()
def let_go_of_files(model: PreTrainedModel, converted: Iterable[Tensor]) -> None:
    """Copies what was not converted: a view of the mapped checkpoint would keep all of that in memory.

    On a GPU nothing is one.
    """
    own = {id(parameter) for parameter in converted}
    for parameter in model.parameters():
        if id(parameter) not in own and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
    heap.trim()  # converting leaves holes of the size of whole weights, which glibc keeps unless asked
