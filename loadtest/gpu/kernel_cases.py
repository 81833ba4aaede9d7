"""Single kernels of ours and what torch has for the same work: attention, adapters, products with few bits.

Each is made several times over, with data of its own, so that a cache does not hold what a model's next layer would
have to read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from fusionserve.adapters.rank_tables import make_tables
from fusionserve.adapters.row_plan import AdaptedTokens, RowRange
from fusionserve.kernels.device.group_parts import GroupParts
from fusionserve.kernels.device.paged_launch import DeviceQueries
from fusionserve.kernels.device.rank_items import RankItems, RankTables
from fusionserve.kernels.linear_product import LinearProduct
from fusionserve.kernels.paged_attention import AttentionOptions
from fusionserve.kernels.paged_sequence import PackedSequence
from fusionserve.kernels.segments import PartRows
from fusionserve.kernels.tiled_linear import TiledLinear, quantize_on

Work = Callable[[], Tensor]

_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSizes:
    """Llama-3-8B's layer and a server's batch; `copies` of everything."""

    num_heads: int = 32
    num_kv_heads: int = 8
    dim: int = 128
    hidden: int = 4096
    inner: int = 14336
    num_streams: int = 64
    context: int = 512
    num_prompts: int = 4
    prompt_tokens: int = 2048
    num_adapters: int = 32
    rank: int = 16
    copies: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCase:
    """One kind of work: ours and the library's, and the least that it must read and multiply."""

    library: str
    ours: Sequence[Work]
    theirs: Sequence[Work]
    num_bytes: int
    flops: int


def kernel_cases(sizes: KernelSizes, device: torch.device) -> dict[str, dict[str, Callable[[], KernelCase]]]:
    """By kind and name what makes each case; one is made at a time, for memory."""
    streams, length, num_prompts = sizes.num_streams, sizes.prompt_tokens, sizes.num_prompts
    attention, adapters, few_bits = (
        partial(make, sizes, device) for make in (_attention, _adapters, _few_bits)
    )
    tokens = streams, num_prompts * length
    return {
        "attention": {
            f"attention, decoding: {streams} x {sizes.context}": partial(
                attention, streams, sizes.context, 1
            ),
            f"attention, prompt: {num_prompts} x {length}": partial(attention, num_prompts, length, length),
        },
        "adapters": {
            f"{sizes.num_adapters} adapters, r={sizes.rank}: {count} tokens": partial(adapters, count)
            for count in tokens
        },
        "products": {
            f"int{bits}, gate and up: {count} tokens": partial(few_bits, bits, count)
            for bits in (8, 4)
            for count in (1, 16, *tokens)
        },
    }


def _attention(
    sizes: KernelSizes, device: torch.device, num_requests: int, length: int, num_new: int
) -> KernelCase:
    """The last num_new tokens of requests of one length, over blocks in any order; the library's lie in a row."""
    made = [_attention_pair(sizes, device, num_requests, length, num_new) for _ in range(sizes.copies)]
    per_query = [length - num_new + 1 + n for n in range(num_new)]
    kv_bytes = num_requests * length * sizes.num_kv_heads * sizes.dim * 4
    query_bytes = num_requests * num_new * sizes.num_heads * sizes.dim * 4
    return KernelCase(
        library="scaled_dot_product_attention",
        ours=[ours for ours, _ in made],
        theirs=[theirs for _, theirs in made],
        num_bytes=kv_bytes + query_bytes,
        flops=4 * num_requests * sizes.num_heads * sizes.dim * sum(per_query),
    )


def _attention_pair(
    sizes: KernelSizes, device: torch.device, num_requests: int, length: int, num_new: int
) -> tuple[Work, Work]:
    per_request = length // _BLOCK_SIZE
    order = torch.randperm(num_requests * per_request)
    query = _random(device, num_requests * num_new, sizes.num_heads, sizes.dim)
    keys, values = (_random(device, len(order) * _BLOCK_SIZE, sizes.num_kv_heads, sizes.dim) for _ in "kv")
    sequences = [
        PackedSequence(n * num_new, (n + 1) * num_new, length - num_new, blocks.tolist())
        for n, blocks in enumerate(order.view(num_requests, per_request))
    ]
    singles, chunks = (sequences, []) if num_new == 1 else ([], sequences)
    heads = sizes.num_heads, sizes.num_kv_heads
    queries = DeviceQueries.make(singles, chunks, _BLOCK_SIZE, heads).to(device)
    options = AttentionOptions(sizes.dim**-0.5)

    def ours() -> Tensor:
        output = torch.empty_like(query)
        queries.attend_(query, keys, values, options, output)
        return output

    places = order.to(device)
    keys_in_a_row, values_in_a_row = (
        kv.view(-1, _BLOCK_SIZE, *kv.shape[1:])[places]
        .view(num_requests, length, *kv.shape[1:])
        .transpose(1, 2)
        for kv in (keys, values)
    )
    batched = query.view(num_requests, num_new, *query.shape[1:]).transpose(1, 2)

    def theirs() -> Tensor:
        attended = functional.scaled_dot_product_attention(
            batched, keys_in_a_row, values_in_a_row, is_causal=num_new > 1, enable_gqa=True
        )
        return attended.transpose(1, 2).reshape(query.shape)

    return ours, theirs


def _adapters(sizes: KernelSizes, device: torch.device, num_tokens: int) -> KernelCase:
    """Shrink and expand of a square module, as many tokens on each adapter."""
    made = [_adapter_pair(sizes, device, num_tokens) for _ in range(sizes.copies)]
    adapter_bytes = 2 * sizes.num_adapters * sizes.rank * 2 * sizes.hidden
    return KernelCase(
        library="two grouped_mm",
        ours=[ours for ours, _ in made],
        theirs=[theirs for _, theirs in made],
        num_bytes=adapter_bytes + 3 * 2 * num_tokens * sizes.hidden,
        flops=4 * num_tokens * sizes.rank * sizes.hidden,
    )


def _adapter_pair(sizes: KernelSizes, device: torch.device, num_tokens: int) -> tuple[Work, Work]:
    count, rank, each = sizes.num_adapters, sizes.rank, num_tokens // sizes.num_adapters
    x, before = _random(device, num_tokens, sizes.hidden), _random(device, num_tokens, sizes.hidden)
    shrink = _random(device, count * rank, sizes.hidden) * sizes.hidden**-0.5
    expand = _random(device, count * rank, sizes.hidden)
    adapted = [
        AdaptedTokens(n * each, (n + 1) * each, (RowRange(n * rank, (n + 1) * rank, 1.0),))
        for n in range(count)
    ]
    module_ids = {"module": 0}
    on_host = make_tables(adapted, [], module_ids)
    tables = RankTables(*(getattr(on_host, name).to(device) for name in RankTables.__slots__))
    items = RankItems(tables, x, module_ids=module_ids, fusion_width=0)
    parts = GroupParts([PartRows(shrink, None, expand)], [0])
    y = before.clone()

    def ours() -> Tensor:
        items.add_(x, parts, [y])
        return y

    ends = torch.arange(each, num_tokens + 1, each, dtype=torch.int32, device=device)
    down, up = shrink.view(count, rank, -1).transpose(1, 2), expand.view(count, rank, -1)
    theirs_y = before.clone()

    def theirs() -> Tensor:
        u = functional.grouped_mm(x, down, offs=ends)
        return theirs_y.add_(functional.grouped_mm(u, up, offs=ends))

    return ours, theirs


def _few_bits(sizes: KernelSizes, device: torch.device, bits: int, num_tokens: int) -> KernelCase:
    """Gate and up; the library multiplies the full weights."""
    d_out = 2 * sizes.inner
    x = _random(device, num_tokens, sizes.hidden)
    ours, theirs = [], []
    for _ in range(sizes.copies):
        weight = _random(device, d_out, sizes.hidden) * sizes.hidden**-0.5
        modules = [quantize_on(device, half, None, bits) for half in weight.chunk(2)]
        ours.append(partial(_multiply, TiledLinear.product(modules), x))
        theirs.append(partial(_multiply_full, weight, x))
    return KernelCase(
        library="bfloat16",
        ours=ours,
        theirs=theirs,
        num_bytes=sum(t.nbytes for module in modules for t in (module.levels, module.scales)),
        flops=2 * num_tokens * d_out * sizes.hidden,
    )


def _multiply(product: LinearProduct, x: Tensor) -> Tensor:
    return product(x)[1]


def _multiply_full(weight: Tensor, x: Tensor) -> Tensor:
    """The second half of what it computes."""
    return functional.linear(x, weight)[:, len(weight) // 2 :]


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).bfloat16()
