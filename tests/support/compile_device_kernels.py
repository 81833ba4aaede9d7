"""Compiles what `kernels/device` launches for a Hopper GPU, which needs no GPU, and prints each kernel's name.

To be run by itself, without TRITON_INTERPRET: the interpreter takes much that the compiler refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fusionserve.kernels.activations import Activation
from fusionserve.kernels.device import (
    few_bits_kernels,
    member_kernels,
    paged_kernels,
    paged_launch,
    pointwise_kernels,
    pointwise_launch,
    rank_kernels,
)
from fusionserve.kernels.device.group_parts import GroupParts
from fusionserve.kernels.device.rank_items import BLOCK, RankItems, RankTables
from fusionserve.kernels.paged_attention import AttentionOptions
from fusionserve.kernels.segments import PartRows
from fusionserve.kernels.tiled_linear import TiledLinear

_HOPPER = GPUTarget("cuda", 90, 32)
_HIDDEN, _INNER, _HEADS, _KV_HEADS, _DIM = 2048, 5632, 16, 4, 128


class _Driver:
    """Of a GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return _HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


@contextmanager
def compiling_only() -> Iterator[set[str]]:
    """Launches in the block compile and do not run; the names of their kernels."""
    launched: set[str] = set()
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: object, **options: object) -> object:
        launched.add(kernel.__name__)
        return run(kernel, *args, **{**options, "warmup": True})

    driver.set_active(_Driver())
    JITFunction.run = compile_only
    try:
        yield launched
    finally:
        JITFunction.run = run


def number(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of a device, without memory; of torch's default type."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_pointwise(num_tokens: int) -> None:
    """Norm, gate and rotation."""
    x, wide = number(num_tokens, _HIDDEN), number(_HIDDEN, dtype=torch.float32)
    for weight, bias in ((number(_HIDDEN), None), (wide, None), (wide, wide)):
        pointwise_launch.normalize(x, weight, bias, 1e-5)
    for activation in Activation:
        pointwise_launch.gated_product(activation, number(num_tokens, _INNER), number(num_tokens, _INNER))
    heads, cache = number(num_tokens, _KV_HEADS, _DIM), number(64, _KV_HEADS, _DIM)
    query, slots = number(num_tokens, _HEADS, _DIM), number(num_tokens, dtype=torch.long)
    for turned in (_DIM, _DIM // 2, 0):
        angles = number(num_tokens, turned, dtype=torch.float32)
        for by_neighbours in (False, True):
            arguments = query, heads, heads, cache, cache, angles, angles, slots
            pointwise_launch.rotate_and_store(*arguments, by_neighbours=by_neighbours)


def launch_attention(count: int) -> None:
    """Single tokens and chunks; so many tokens, tiles and blocks of a request."""
    query, cache = number(count, _HEADS, _DIM), number(640, _KV_HEADS, _DIM)
    for tokens in (1, paged_launch.chunk_tokens(_HEADS, _KV_HEADS)):
        tables = paged_launch.QueryTables(
            number(count, 4, dtype=torch.int32), number(count, count, dtype=torch.int32), tokens
        )
        sinks = number(_HEADS, dtype=torch.float32)
        windowed = AttentionOptions(0.1, sliding_window=64, softcap=30.0)
        for options in (AttentionOptions(0.1), windowed, AttentionOptions(0.1, sinks=sinks)):
            paged_launch.attend_(query, cache, cache, tables, 16, options, number(count, _HEADS, _DIM))


def launch_rank_items(count: int) -> None:
    """Shrink, the attention of fusions, expand; and embeddings. So many items and fused tokens."""
    sizes = {
        "tiles": (4, 4),
        "items": (count, 6),
        "groups": (2, 5),
        "member_of_row": (64,),
        "attends": (2, 3),
    }
    tables = RankTables(
        **{name: number(*shape, dtype=torch.int32) for name, shape in sizes.items()},
        given=number(count, BLOCK, BLOCK, dtype=torch.float32),
        fused=number(count, 4, dtype=torch.long),
        present=number(2, 3, dtype=torch.long),
    )
    ids = {"q": 0, "k": 1, "v": 2}
    for d_in, places in ((_HIDDEN, 3), (_INNER, 1)):
        parts = [PartRows(number(256, d_in), number(256), number(256, _HIDDEN)) for _ in range(places)]
        for width in (0, 4):
            items = RankItems(tables, number(0), module_ids=ids, fusion_width=width)
            outputs = [number(9, _HIDDEN) for _ in range(places)]
            items.add_(number(9, d_in), GroupParts(parts, range(places)), outputs)
    embedded = PartRows(number(256, 32000), number(256), number(256, _HIDDEN))
    items.add_embedded_(number(9, dtype=torch.long), GroupParts([embedded], [0]), number(9, _HIDDEN), 1.0)


def launch_few_bits(*counts: int) -> None:
    """Products of one module and of three, with and without bias, of so many tokens."""
    for bits in (8, 4):
        for d_outs, has_bias in (((_HIDDEN,), False), ((_HIDDEN, 512, 512), True)):
            modules = [tiled_linear(_INNER, d_out, bits, has_bias=has_bias) for d_out in d_outs]
            product = TiledLinear.product(modules)
            for num_tokens in counts:
                x = number(num_tokens, _INNER)
                product(x)
                if len(modules) == 1:
                    product.add_(x, number(num_tokens, _HIDDEN))


def tiled_linear(d_in: int, d_out: int, bits: int, *, has_bias: bool) -> TiledLinear:
    """A module without weights."""
    levels = number(d_out // 16, d_in // (32 if bits == 8 else 64), 16, 32, dtype=torch.int8)
    scales = number(d_out // 16, d_in // 32, 16, dtype=torch.bfloat16)
    bias = number(d_out) if has_bias else None
    return TiledLinear(
        levels, scales, bias, out_features=16 * len(levels), bits=bits, dtype=torch.get_default_dtype()
    )


def num_variants() -> int:
    """Compiled so far, of all kernels."""
    modules = member_kernels, paged_kernels, pointwise_kernels, rank_kernels, few_bits_kernels
    kernels = {k for module in modules for k in vars(module).values() if isinstance(k, JITFunction)}
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


if __name__ == "__main__":
    with compiling_only() as launched:
        for dtype in (torch.bfloat16, torch.float32):
            torch.set_default_dtype(dtype)
            for launch in (launch_pointwise, launch_attention, launch_rank_items):
                launch(3)
        torch.set_default_dtype(torch.bfloat16)
        launch_few_bits(1, 20, 64, 4096)
        before = num_variants()
        for count in (1, 16):  # the numbers that Triton has variants for
            launch_pointwise(count)
            launch_attention(count)
            launch_rank_items(count)
        launch_few_bits(16, 21, 72, 4099)
        assert num_variants() == before, (
            f"{num_variants() - before} variants more, by numbers of tokens or items"
        )
    print(*sorted(launched))
