"""A short identity of a base model's weights, so that a fusion is never served on another base.

It covers the sizes, the first rows of the input embedding and every one-dimensional parameter (norms and biases), all
rounded to bfloat16: cheap for the largest model, and the same for a checkpoint in float32 and bfloat16, in one file or
many, and with quantized linear weights. Continued training of the whole model changes it; what was merged into the
linear weights alone, as an adapter may be, does not.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fusionserve.adapters.stored_weights import StoredWeights

_NUM_EMBEDDING_ROWS = 64


def base_fingerprint(model: PreTrainedModel, stored: StoredWeights | None = None) -> str:
    """sha256 (hex) over sizes and a sample of the weights; empty for a model without data (on the meta device).

    The sample is of the `stored` weights, where they are: a model in float16 has lost bits of them that bfloat16 keeps.
    Call it before any module is replaced.
    """
    if model.device.type == "meta":
        return ""
    config = model.config.get_text_config()
    sizes = (config.model_type, config.hidden_size, config.num_hidden_layers, config.vocab_size)
    digest = hashlib.sha256(repr(sizes).encode())
    embedding = model.get_input_embeddings().weight
    parameters = dict(model.named_parameters())
    assert isinstance(embedding, Tensor)
    name = next(name for name, parameter in parameters.items() if parameter is embedding)
    digest.update(_rounded_bytes(_first_rows(name, embedding, _NUM_EMBEDDING_ROWS, stored)))
    for name, parameter in sorted(parameters.items()):
        if parameter.ndim == 1:
            digest.update(name.encode())
            digest.update(_rounded_bytes(_first_rows(name, parameter, len(parameter), stored)))
    return digest.hexdigest()


def _first_rows(name: str, parameter: Tensor, num_rows: int, stored: StoredWeights | None) -> Tensor:
    found = None if stored is None else stored.first_rows(name, tuple(parameter.shape), num_rows)
    return parameter[:num_rows] if found is None else found


def _rounded_bytes(tensor: Tensor) -> bytes:
    rounded = tensor.detach().to(device="cpu", dtype=torch.bfloat16).contiguous()
    return rounded.view(torch.uint8).numpy().tobytes()
