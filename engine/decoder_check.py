"""Finds out, before serving, whether a decoder of our own says what the model it is made from says.

Families are known by the names of their classes; what these compute is transformers' to change. So two short prompts
go through both, on the same modules. Where they differ, or ours cannot be made, the model's own forward serves: slower,
and right.
"""

from __future__ import annotations

import logging
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fusionserve import heap
from fusionserve.engine.attention import AttentionBatch, attending_to
from fusionserve.engine.decoder_model import DecoderModel
from fusionserve.engine.fit_check import ModelFit, in_one_row, make_prompts, max_error, relative_errors
from fusionserve.engine.model_form import model_form
from fusionserve.kernels.huge_pages import HugePages
from fusionserve.kernels.layer_cache import LayerCache
from fusionserve.kernels.paged_batch import PagedBatch
from fusionserve.kernels.paged_sequence import PackedSequence

_BLOCK_SIZE = 16

logger = logging.getLogger(__name__)


def make_decoder(
    model: PreTrainedModel, fit: ModelFit, max_context_tokens: int, dtype: torch.dtype, *, is_quantized: bool
) -> DecoderModel | None:
    """For a model whose linear modules are adapted ones; None if it is not known, or not what it was."""
    try:
        form = model_form(model, fit.attention_options)
        if form is None:
            return None
        decoder = DecoderModel(form, max_context_tokens, dtype)
        # Inputs in 8 bits turn a last digit into a step.
        limit = max_error(torch.bfloat16 if is_quantized else dtype)
        error = _error(model, decoder, fit, dtype)
        heap.trim()  # of logits of every position, several times
    except Exception as failure:  # what is missing depends on the release of transformers
        logger.warning("no decoder of our own for %s: %r", type(model).__name__, failure)
        return None
    if not error <= limit:
        logger.warning(
            "the decoder of our own for %s is off by %.2g: transformers' forward serves, slower",
            type(model).__name__,
            error,
        )
        return None
    return decoder


@torch.inference_mode()
def _error(model: PreTrainedModel, decoder: DecoderModel, fit: ModelFit, dtype: torch.dtype) -> float:
    """The median over positions: of a mixture of experts a position may be routed elsewhere by a last digit."""
    prompts = make_prompts(model)
    token_ids, positions = in_one_row(prompts)
    like = torch.empty(0, dtype=dtype, device=token_ids.device)
    num_slots, pages = _BLOCK_SIZE * len(prompts), HugePages()
    caches = {
        module: LayerCache.zeros(like, num_slots, _BLOCK_SIZE, shape.sizes, pages)
        for module, shape in fit.cache_shapes.items()
    }
    ends = list(accumulate((len(ids) for ids in prompts), initial=0))
    sequences = [PackedSequence(start, end, 0, [n]) for n, (start, end) in enumerate(pairwise(ends))]

    def batch() -> AttentionBatch:
        return AttentionBatch(caches, PagedBatch(sequences, _BLOCK_SIZE, token_ids.device))

    with attending_to(batch()):
        inputs = {"input_ids": token_ids[None], "position_ids": positions[None]}
        expected: Tensor = model(**inputs, use_cache=False).logits[0]
    found = decoder.logits(token_ids, positions, None, batch())
    return relative_errors(expected.float(), found.float()).median().item()
