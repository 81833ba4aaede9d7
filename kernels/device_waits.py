"""Waiting for a GPU, found out by forbidding it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def refusing_waits() -> Iterator[None]:
    """Has operations of torch raise a RuntimeError instead of waiting for a GPU, in all threads; not all notice."""
    mode = torch.cuda.get_sync_debug_mode()
    _set_mode("error")
    try:
        yield
    finally:
        _set_mode(mode)


def _set_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says once that it does not find everything
        torch.cuda.set_sync_debug_mode(mode)
