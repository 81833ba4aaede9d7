"""Compiles what `kernels/device` launches for a Hopper GPU, which needs no GPU.

Prints a line per kernel: its name, variants, and the most bytes of shared memory that one takes. A program that takes
more than a multiprocessor gives would fail when it is launched, and fails here. To be run by itself, without
TRITON_INTERPRET: the interpreter takes much that the compiler refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fusionserve.kernels.activations import Activation
from fusionserve.kernels.device import paged_launch, pointwise_launch
from fusionserve.kernels.device.group_parts import GroupParts
from fusionserve.kernels.device.rank_items import BLOCK, RankItems, RankTables
from fusionserve.kernels.paged_attention import AttentionOptions
from fusionserve.kernels.segments import PartRows
from fusionserve.kernels.tiled_linear import TiledLinear

_HOPPER = GPUTarget("cuda", 90, 32)
_MAX_SHARED_BYTES = 232_448  # of a program


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model's layers."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    vocab: int


LLAMA_3_8B = Shape(4096, 14336, 32, 8, 128, 128256)
QWEN_2_5_05B = Shape(896, 4864, 14, 2, 64, 151936)
GEMMA_3_1B = Shape(1152, 6912, 4, 1, 256, 262145)  # with a token that somebody added


class _Driver:
    """Of a GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return _HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


@contextmanager
def compiling_only() -> Iterator[dict[str, dict[str, int]]]:
    """Launches in the block compile and do not run; by kernel the shared bytes of each variant.

    Raises MemoryError for a variant that takes too many.
    """
    shared: dict[str, dict[str, int]] = {}
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: object, **options: object) -> object:
        compiled = run(kernel, *args, **{**options, "warmup": True})
        num_bytes = compiled.metadata.shared
        if num_bytes > _MAX_SHARED_BYTES:
            raise MemoryError(f"{kernel.__name__} takes {num_bytes} bytes of shared memory")
        shared.setdefault(kernel.__name__, {})[compiled.hash] = num_bytes
        return compiled

    driver.set_active(_Driver())
    JITFunction.run = compile_only
    try:
        yield shared
    finally:
        JITFunction.run = run


def number(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of a device, without memory; of torch's default type."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_pointwise(shape: Shape, num_tokens: int) -> None:
    """Norm, gate and rotation."""
    x, wide = number(num_tokens, shape.hidden), number(shape.hidden, dtype=torch.float32)
    for weight, bias in ((number(shape.hidden), None), (wide, None), (wide, wide)):
        pointwise_launch.normalize(x, weight, bias, 1e-5)
    for activation in Activation:
        pointwise_launch.gated_product(
            activation, number(num_tokens, shape.inner), number(num_tokens, shape.inner)
        )
    heads, cache = number(num_tokens, shape.kv_heads, shape.dim), number(64, shape.kv_heads, shape.dim)
    query, slots = number(num_tokens, shape.heads, shape.dim), number(num_tokens, dtype=torch.long)
    for turned in (shape.dim, shape.dim // 2, 0):
        angles = number(num_tokens, turned, dtype=torch.float32)
        for by_neighbours in (False, True):
            arguments = query, heads, heads, cache, cache, angles, angles, slots
            pointwise_launch.rotate_and_store(*arguments, by_neighbours=by_neighbours)


def launch_attention(shape: Shape, count: int) -> None:
    """Single tokens and chunks; so many tokens, tiles and blocks of a request."""
    query, cache = number(count, shape.heads, shape.dim), number(640, shape.kv_heads, shape.dim)
    for tokens in (1, paged_launch.chunk_tokens(shape.heads, shape.kv_heads)):
        tables = paged_launch.QueryTables(
            number(count, 4, dtype=torch.int32), number(count, count, dtype=torch.int32), tokens
        )
        sinks = number(shape.heads, dtype=torch.float32)
        windowed = AttentionOptions(0.1, sliding_window=64, softcap=30.0)
        for options in (AttentionOptions(0.1), windowed, AttentionOptions(0.1, sinks=sinks)):
            output = torch.empty_like(query)
            paged_launch.attend_(query, cache, cache, tables, 16, options, output)


def launch_rank_items(shape: Shape, count: int) -> None:
    """Shrink, the attention of fusions, expand; and embeddings. So many items and fused tokens."""
    for d_in, d_out, places in (
        (shape.hidden, shape.hidden, 3),
        (shape.inner, shape.hidden, 1),
        (shape.hidden, shape.vocab, 1),
    ):
        for width in (0, 4):
            launch_group(d_in, [d_out] * places, rank_items(count, width))
    embedded = PartRows(number(256, shape.vocab), number(256), number(256, shape.hidden))
    output = number(9, shape.hidden)
    rank_items(count, 4).add_embedded_(number(9, dtype=torch.long), GroupParts([embedded], [0]), output, 1.0)


def rank_items(count: int, width: int) -> RankItems:
    """So many items and fused tokens, of fusions of so many members."""
    sizes = {
        "tiles": (4, 4),
        "items": (count, 6),
        "groups": (2, 5),
        "member_of_row": (64,),
        "attends": (2, 3),
    }
    tables = RankTables(
        **{name: number(*size, dtype=torch.int32) for name, size in sizes.items()},
        given=number(count, BLOCK, BLOCK, dtype=torch.float32),
        fused=number(count, 4, dtype=torch.long),
        present=number(2, 3, dtype=torch.long),
    )
    return RankItems(tables, number(0), module_ids={"q": 0, "k": 1, "v": 2}, fusion_width=width)


def launch_group(d_in: int, d_outs: list[int], items: RankItems) -> None:
    """What items add to the outputs of modules that share an input."""
    parts = [PartRows(number(256, d_in), number(256), number(256, d_out)) for d_out in d_outs]
    outputs = [number(9, d_out) for d_out in d_outs]
    items.add_(number(9, d_in), GroupParts(parts, range(len(parts))), outputs)


def launch_layer(shape: Shape, count: int) -> None:
    """All of a layer in full, with adapters, for so many of whatever is counted."""
    launch_pointwise(shape, count)
    launch_attention(shape, count)
    launch_rank_items(shape, count)


def launch_odd_heads(dim: int, heads: int = 8) -> None:
    """Attention and rotation of heads whose dims may be no power of two, without what options add."""
    query, cache = number(3, heads, dim), number(640, heads, dim)
    for tokens in (1, paged_launch.chunk_tokens(heads, heads)):
        tiles, blocks = number(3, 4, dtype=torch.int32), number(3, 3, dtype=torch.int32)
        tables = paged_launch.QueryTables(tiles, blocks, tokens)
        paged_launch.attend_(query, cache, cache, tables, 16, AttentionOptions(0.1), torch.empty_like(query))
    angles, slots = number(3, dim, dtype=torch.float32), number(3, dtype=torch.long)
    pointwise_launch.rotate_and_store(query, query, query, cache, cache, angles, angles, slots)


def launch_few_bits(shape: Shape, *counts: int) -> None:
    """Products of one module and of three, with and without bias, of so many tokens."""
    kv_width = shape.kv_heads * shape.dim
    for bits in (8, 4):
        for d_outs, has_bias in (((shape.hidden,), False), ((shape.hidden, kv_width, kv_width), True)):
            modules = [tiled_linear(shape.inner, d_out, bits, has_bias=has_bias) for d_out in d_outs]
            product = TiledLinear.product(modules)
            for num_tokens in counts:
                x = number(num_tokens, shape.inner)
                product(x)
                if len(modules) == 1:
                    product.add_(x, number(num_tokens, shape.hidden))


def tiled_linear(d_in: int, d_out: int, bits: int, *, has_bias: bool) -> TiledLinear:
    """A module without weights."""
    levels = number(d_out // 16, d_in // (32 if bits == 8 else 64), 16, 32, dtype=torch.int8)
    scales = number(d_out // 16, d_in // 32, 16, dtype=torch.bfloat16)
    bias = number(d_out) if has_bias else None
    return TiledLinear(
        levels, scales, bias, out_features=16 * len(levels), bits=bits, dtype=torch.get_default_dtype()
    )


if __name__ == "__main__":
    with compiling_only() as shared:
        torch.set_default_dtype(torch.float32)
        launch_layer(QWEN_2_5_05B, 3)
        torch.set_default_dtype(torch.bfloat16)
        launch_layer(LLAMA_3_8B, 3)
        launch_attention(GEMMA_3_1B, 3)  # the widest heads
        launch_few_bits(LLAMA_3_8B, 1, 20, 64, 4096)
        launch_odd_heads(80)
        for width in (1, 64):  # the fewest and most members
            launch_group(896, [896], rank_items(3, width))
        torch.set_default_dtype(torch.float16)
        launch_odd_heads(64)
        launch_group(896, [896], rank_items(3, 4))
        torch.set_default_dtype(torch.bfloat16)
        before = {name: len(variants) for name, variants in shared.items()}
        for count in (1, 16):  # the numbers that Triton has variants for
            launch_layer(LLAMA_3_8B, count)
        launch_few_bits(LLAMA_3_8B, 16, 21, 72, 4099)
        more = {name for name, variants in shared.items() if len(variants) > before[name]}
        assert not more, f"variants by numbers of tokens or items: {more}"
    for name, variants in sorted(shared.items()):
        print(name, len(variants), max(variants.values()))
