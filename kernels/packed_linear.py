"""Linear modules of one input whose bfloat16 weights lie packed for the processor's pairwise product.

    y = x W^T + b       or, onto a residual, y += x W^T + b

Every output is summed in an order that does not depend on the batch, so a token gets the same bits in any company.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusionserve.kernels.native_call import Tokens
from fusionserve.kernels.native_library import native_library

_PANEL = 16  # outputs that lie together


class _Part(ctypes.Structure):
    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("d_out", ctypes.c_int64),
        ("add", ctypes.c_int64),
    )


def can_pack(weight: Tensor) -> bool:
    """True for a weight [d_out, d_in] that the packed product takes, on a processor that has it."""
    library = native_library()
    return (
        library is not None
        and weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.shape[0] % _PANEL == 0
        and weight.shape[1] % 2 == 0
        and bool(library.has_packed_linear())
    )


def pack(weight: Tensor) -> Tensor:
    """[d_out, d_in] -> panels of 16 outputs, each pair of inputs together: [d_out / 16, d_in / 2, 16, 2]."""
    d_out, d_in = weight.shape
    return weight.reshape(d_out // _PANEL, _PANEL, d_in // 2, 2).transpose(1, 2).contiguous()


def unpack(packed: Tensor) -> Tensor:
    """The weight [d_out, d_in] again."""
    num_panels, num_pairs = packed.shape[:2]
    return packed.transpose(1, 2).reshape(num_panels * _PANEL, num_pairs * 2)


class PackedLinear(nn.Module):
    """Stands in for an nn.Linear; holds its weight packed, and no other copy."""

    def __init__(self, packed: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.in_features = packed.shape[1] * 2
        self.out_features = packed.shape[0] * _PANEL

    @property
    def weight(self) -> Tensor:
        """A copy of the weight [d_out, d_in]; some models look at it, few read it."""
        return unpack(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out]."""
        return PackedProduct([self])(x)[0]


class PackedEmbedding(nn.Module):
    """Stands in for an nn.Embedding whose weight is tied to a packed LM head: reads its rows there."""

    def __init__(self, head: PackedLinear) -> None:
        super().__init__()
        self.packed = head.packed
        self.embedding_dim = head.in_features

    @property
    def weight(self) -> Tensor:
        """A copy of the weight [vocab, hidden]."""
        return unpack(self.packed)

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids [..., num_tokens] -> [..., num_tokens, hidden]."""
        ids = token_ids.reshape(-1).contiguous()
        assert ids.dtype == torch.long
        rows = self.packed.new_empty(ids.numel(), self.embedding_dim)
        library = native_library()
        assert library is not None, "packed without a native library"
        library.unpack_rows(
            ctypes.c_void_p(self.packed.data_ptr()),
            ctypes.c_void_p(ids.data_ptr()),
            ctypes.c_int64(ids.numel()),
            ctypes.c_int64(self.embedding_dim),
            ctypes.c_void_p(rows.data_ptr()),
        )
        return rows.view(*token_ids.shape, self.embedding_dim)


class PackedProduct:
    """The product of one input with the weights of several modules, in one call."""

    def __init__(self, modules: Sequence[PackedLinear]) -> None:
        self._modules = tuple(modules)  # their memory must outlive the pointers
        self._d_in = modules[0].in_features
        self._parts = (_Part * len(modules))()
        for part, module in zip(self._parts, modules, strict=True):
            part.packed = module.packed.data_ptr()
            part.bias = None if module.bias is None else module.bias.data_ptr()
            part.d_out = module.out_features
        library = native_library()
        assert library is not None, "packed without a native library"
        self._call = library.packed_linear

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x [..., d_in] -> y [..., d_out] of each module."""
        outputs = [x.new_empty(*x.shape[:-1], module.out_features) for module in self._modules]
        self._compute(x, outputs, add=False)
        return outputs

    def add_(self, x: Tensor, residual: Tensor) -> None:
        """residual += W x + b, in place, for a single module; rounded once."""
        self._compute(x, [residual], add=True)

    def _compute(self, x: Tensor, outputs: Sequence[Tensor], *, add: bool) -> None:
        x = x.reshape(-1, x.shape[-1])
        if x.stride(-1) != 1:
            x = x.contiguous()
        assert x.dtype == torch.bfloat16 and x.shape[1] == self._d_in
        for part, y in zip(self._parts, outputs, strict=True):
            assert y.dtype == x.dtype and y.is_contiguous() and y.numel() == len(x) * part.d_out
            part.y, part.add = y.data_ptr(), add
        self._call(ctypes.byref(Tokens.of(x)), self._parts, ctypes.c_int64(len(self._parts)))


def reference_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition in float32; the oracle of the packed product."""
    return functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
