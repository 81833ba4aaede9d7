"""Attention over a paged key-value cache, grouped-query heads included.

    o_t = softmax_j(scale * q_t . k_j) v_j     over the cached positions j <= t of the token's own request,
                                               j > t - window where there is a sliding window;
    with soft-capping the score s becomes cap * tanh(s / cap).

K and V of a layer are flat arrays of slots, [num_slots, kv_heads, dim]; a request's slots are those of its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What a layer adds to plain attention: `softmax_scale`, and maybe a sliding window and a soft cap."""

    softmax_scale: float
    sliding_window: int | None = None
    softcap: float | None = None


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, mask: Tensor, options: AttentionOptions
) -> Tensor:
    """One query token per request, over padded slot lists.

    query [requests, heads, dim], keys and values [num_slots, kv_heads, dim], slots [requests, context],
    mask [requests, context] (True: attend) -> [requests, heads, dim]. The query heads that share a KV head are laid
    out as query rows, so K and V are never repeated.
    """
    num_requests, num_heads, dim = query.shape
    num_kv_heads = keys.shape[1]
    grouped = query.view(num_requests, num_kv_heads, num_heads // num_kv_heads, dim)
    output = _attend(
        grouped, keys[slots].transpose(1, 2), values[slots].transpose(1, 2), mask[:, None, None, :], options
    )
    return output.reshape(num_requests, num_heads, values.shape[-1])


def chunk_attention(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """The last `tokens` positions of one request, over all its slots.

    query [tokens, heads, dim], slots [context], mask [tokens, context] or None for plain causal with no earlier
    context -> [tokens, heads, dim].
    """
    num_groups = query.shape[1] // keys.shape[1]
    k = keys[slots].repeat_interleave(num_groups, dim=1).transpose(0, 1)[None]
    v = values[slots].repeat_interleave(num_groups, dim=1).transpose(0, 1)[None]
    output = _attend(query.transpose(0, 1)[None], k, v, mask, options)
    return output[0].transpose(0, 1)


def causal_mask(query_start: int, num_tokens: int, context: int, sliding_window: int | None) -> Tensor:
    """[num_tokens, context], True where position query_start + t may attend to position j."""
    positions = torch.arange(query_start, query_start + num_tokens)[:, None]
    others = torch.arange(context)[None, :]
    mask = others <= positions
    if sliding_window is not None:
        mask &= others > positions - sliding_window
    return mask


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """query [batch, heads, tokens, dim]; mask broadcasts to [batch, heads, tokens, context], None is causal."""
    if options.softcap is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=options.softmax_scale
        )
    return _softcapped_attention(query, key, value, mask, options.softmax_scale, options.softcap)


def _softcapped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    if mask is None:
        mask = causal_mask(0, query.shape[-2], key.shape[-2], None).to(query.device)
    scores = torch.tanh(query @ key.transpose(-1, -2) * scale / softcap) * softcap
    scores = scores.float().masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1).to(value.dtype) @ value


def reference_attention(
    query: Tensor, keys: Tensor, values: Tensor, query_start: int, options: AttentionOptions
) -> Tensor:
    """The definition for one request, head by head and token by token; keys and values [context, kv_heads, dim]."""
    num_tokens, num_heads, _ = query.shape
    output = query.new_empty(num_tokens, num_heads, values.shape[-1])
    for token in range(num_tokens):
        position = query_start + token
        first = 0 if options.sliding_window is None else max(0, position - options.sliding_window + 1)
        for head in range(num_heads):
            kv_head = head * keys.shape[1] // num_heads
            scores = keys[first : position + 1, kv_head] @ query[token, head] * options.softmax_scale
            if options.softcap is not None:
                scores = torch.tanh(scores / options.softcap) * options.softcap
            output[token, head] = torch.softmax(scores, 0) @ values[first : position + 1, kv_head]
    return output
