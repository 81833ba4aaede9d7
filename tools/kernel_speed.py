"""Times products with weights from memory: packed here in bfloat16, int8 and int4, and by torch's own operations.

    python -P tools/kernel_speed.py

Microseconds of one product, its call from Python included; median of the rounds. The weights of one round are larger
than the caches of most processors, so they come from memory, as in a decoding step.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: as the server sets it

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fusionserve.kernels.huge_pages import HugePages
from fusionserve.kernels.linear_product import LinearProduct
from fusionserve.kernels.packed_linear import PackedLinear
from fusionserve.kernels.quantized_linear import quantize

_SIZES = ((576, 960), (576, 576), (576, 3072), (1536, 576), (896, 9728), (4864, 896), (576, 49152))
_TOKENS = (1, 16, 512)
_ROUND_BYTES = 160e6
_ROUNDS = 5

Product = Callable[[Tensor], object]


def main() -> None:
    """Prints the table."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    kinds = ("packed here", "int8 here", "int4 here", "oneDNN packed", "oneDNN", "torch int8")
    print(f"| d_in x d_out, tokens | {' | '.join(kinds)} |")
    print(f"| --- |{' ---: |' * len(kinds)}")
    for d_in, d_out in _SIZES:
        products = [_products(kind, d_in, d_out) for kind in kinds]
        for num_tokens in _TOKENS:
            x = torch.randn(num_tokens, d_in).bfloat16()
            times = [f"{_median_us(some, x):,.0f}" for some in products]
            print(f"| {d_in} x {d_out}, {num_tokens} | {' | '.join(times)} |", flush=True)


def _products(kind: str, d_in: int, d_out: int) -> list[Product]:
    """As many products with weights of their own as fill a round."""
    bytes_per_weight = {"int8 here": 1.06, "torch int8": 1.0, "int4 here": 0.56}.get(kind, 2.0)
    count = max(1, round(_ROUND_BYTES / (d_in * d_out * bytes_per_weight)))
    weight = (torch.randn(d_out, d_in) * d_in**-0.5).bfloat16()
    pages = HugePages()
    return [_product(kind, weight.clone(), pages) for _ in range(count)]


def _product(kind: str, weight: Tensor, pages: HugePages) -> Product:
    if kind == "packed here":
        return LinearProduct([PackedLinear(weight, None, pages)])
    if kind in ("int8 here", "int4 here"):
        return LinearProduct([quantize(weight, None, 8 if kind == "int8 here" else 4, pages)])
    if kind == "oneDNN packed":
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    if kind == "oneDNN":
        return lambda x: functional.linear(x, weight)
    levels = (weight.float() * 100).round().clamp(-127, 127).to(torch.int8)
    scales = torch.ones(len(weight), dtype=torch.bfloat16)
    return lambda x: torch._weight_int8pack_mm(x, levels, scales)


def _median_us(products: list[Product], x: Tensor) -> float:
    times = []
    for _ in range(_ROUNDS):
        start_s = time.perf_counter()
        for product in products:
            product(x)
        times.append((time.perf_counter() - start_s) / len(products))
    return statistics.median(times) * 1e6


if __name__ == "__main__":
    main()
