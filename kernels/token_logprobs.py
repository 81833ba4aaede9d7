"""Log-probabilities of tokens, with their ranks and the most likely others: log softmax of rows of logits, in float32.

Natively where there is a library and the type is float32 or bfloat16 (`native/token_logprobs.cpp`); else with torch's
operations.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from fusionserve.kernels.host_copy import to_device
from fusionserve.kernels.native_call import native_function


class LogprobTensors(NamedTuple):
    """Of the tokens that were asked for."""

    logprobs: Tensor  # [tokens], float32
    ranks: Tensor  # [tokens]: 1 for the most likely token of a row
    top: Tensor  # [tokens, num_top], float32, descending
    top_ids: Tensor  # [tokens, num_top]


class _Wanted(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("row", "token")),
        *((name, c_void_p) for name in LogprobTensors._fields),
    )


def token_logprobs(
    logits: Tensor, rows: Sequence[int], token_ids: Sequence[int], num_top: int
) -> LogprobTensors:
    """`token_ids`, each under its row of logits [rows, vocab], and the `num_top` most likely tokens there.

    All NaN where the largest logit is not finite or one is NaN.
    """
    native = native_function("token_logprobs", logits)
    if native is None:
        return reference_token_logprobs(logits, rows, token_ids, num_top)
    logits, count = logits.contiguous(), len(token_ids)
    assert all(0 <= row < len(logits) for row in rows)
    assert all(0 <= token_id < logits.shape[1] for token_id in token_ids)
    num_top = min(num_top, logits.shape[1])
    found = LogprobTensors(
        torch.empty(count),
        torch.empty(count, dtype=torch.long),
        torch.empty(count, num_top),
        torch.empty(count, num_top, dtype=torch.long),
    )
    wanted = (
        _Wanted(row, token_id, *(tensor[place].data_ptr() for tensor in found))
        for place, (row, token_id) in enumerate(zip(rows, token_ids, strict=True))
    )
    entries = (_Wanted * count)(*wanted)
    native(c_void_p(logits.data_ptr()), c_int64(logits.shape[1]), entries, c_int64(count), c_int64(num_top))
    return found


def reference_token_logprobs(
    logits: Tensor, rows: Sequence[int], token_ids: Sequence[int], num_top: int
) -> LogprobTensors:
    """The definition."""
    places = to_device(rows, torch.long, logits.device)
    logprobs = torch.log_softmax(logits.index_select(0, places).float(), dim=-1)
    chosen = logprobs.gather(1, to_device(token_ids, torch.long, logits.device)[:, None])
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    top = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
    return LogprobTensors(chosen[:, 0], ranks, top.values, top.indices)
