"""Attention over a paged key-value cache, grouped-query heads included.

    o_t = softmax_j(scale * q_t . k_j) v_j     over the cached positions j <= t of the token's own request,
                                               j > t - window where there is a sliding window;
    with soft-capping the score s becomes cap * tanh(s / cap);
    with sinks a score more takes part in a head's softmax, whose value is zero (Xiao et al. 2023, arXiv:2309.17453).

K and V of a layer are flat arrays of slots, [num_slots, kv_heads, dim]; a request's slots are those of its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What a layer adds to plain attention: `softmax_scale`, and maybe a sliding window, a soft cap and sinks."""

    softmax_scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = field(default=None, compare=False)  # [num_heads], float32, contiguous: scores


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
    sinks = None if options.sinks is None else options.sinks.view(1, num_kv_heads, -1, 1)
    k, v = keys[slots].transpose(1, 2), values[slots].transpose(1, 2)
    output = _attend(grouped, k, v, mask[:, None, None, :], options, sinks)
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
    sinks = None if options.sinks is None else options.sinks.view(1, -1, 1, 1)
    output = _attend(query.transpose(0, 1)[None], k, v, mask, options, sinks)
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: AttentionOptions,
    sinks: Tensor | None,
) -> Tensor:
    """query [batch, heads, tokens, dim]; mask broadcasts to [batch, heads, tokens, context], None is causal.

    So do the sinks, to a context of one.
    """
    if options.softcap is None and sinks is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=options.softmax_scale
        )
    if mask is None:
        mask = causal_mask(0, query.shape[-2], key.shape[-2], None).to(query.device)
    scores = _capped(query @ key.transpose(-1, -2) * options.softmax_scale, options.softcap)
    scores = scores.float().masked_fill(~mask, float("-inf"))
    return _softmax(scores, sinks).to(value.dtype) @ value


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Of scores [..., context] and a sink of each row [..., 1]: the weights [..., context]."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    both = torch.cat((scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)), dim=-1)
    return torch.softmax(both, dim=-1)[..., :-1]


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
            sink = None if options.sinks is None else options.sinks[head : head + 1]
            weights = _softmax(_capped(scores, options.softcap), sink)
            output[token, head] = weights @ values[first : position + 1, kv_head]
    return output
