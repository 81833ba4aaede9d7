"""How many numbers a model has, and how many bytes they take, in any storage."""

from __future__ import annotations

import math

from torch import Tensor, nn


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, each shared one once; of NF4 ones with the scales beside them."""
    return sum(parameter.nbytes + _scale_bytes(parameter) for parameter in model.parameters())


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; one stored in 4 bits counts as the numbers it stands for."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        number = parameter.numel() if state is None else math.prod(state.shape)
        total += number
        trainable += number if parameter.requires_grad else 0
    return trainable, total


def _scale_bytes(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return 0
    tensors = state.as_dict(packed=True).values()
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
