"""A short identity of a base model's weights, so that a fusion is never served on another base.

It covers the sizes, the first rows of the input embedding and every one-dimensional parameter (norms and biases), all
rounded to bfloat16: cheap for the largest model, and the same for a checkpoint in float32 and bfloat16, in one file or
many, and with quantized linear weights. Continued training changes it.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from transformers import PreTrainedModel

_NUM_EMBEDDING_ROWS = 64


def base_fingerprint(model: PreTrainedModel) -> str:
    """sha256 (hex) over sizes and a sample of the weights; empty for a model without data (on the meta device).

    Call it before any module is replaced.
    """
    if model.device.type == "meta":
        return ""
    config = model.config.get_text_config()
    sizes = (config.model_type, config.hidden_size, config.num_hidden_layers, config.vocab_size)
    digest = hashlib.sha256(repr(sizes).encode())
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    digest.update(_rounded_bytes(embedding[:_NUM_EMBEDDING_ROWS]))
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 1:
            digest.update(name.encode())
            digest.update(_rounded_bytes(parameter))
    return digest.hexdigest()


def _rounded_bytes(tensor: Tensor) -> bytes:
    rounded = tensor.detach().to(device="cpu", dtype=torch.bfloat16).contiguous()
    return rounded.view(torch.uint8).numpy().tobytes()
