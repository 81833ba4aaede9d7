"""Linear modules whose weights lie in panels of 16 outputs for a native product, and their product with a shared input.

    y = x W^T + b       or, onto a residual, y += x W^T + b

Every output is summed in an order that does not depend on the batch, so a token gets the same bits in any company.
Panels that lie on a GPU have products of their own (`tiled_linear.py`).
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from ctypes import c_int64, c_void_p

from torch import Tensor, nn

from fusionserve.kernels.native_call import NativeFunction, Tokens, native_function

PANEL = 16  # outputs that lie together


def num_panels(d_out: int) -> int:
    """Those of so many outputs; the last one may be filled up with zeros."""
    return -(-d_out // PANEL)


class PanelLinear(nn.Module, ABC):
    """Stands in for an nn.Linear [d_out, d_in]; holds its weight in panels, and no other copy."""

    kernel: str | None  # the product, a native one or one on a GPU; None: there is none on this processor

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """A copy of the weight [d_out, d_in]; some models look at it, few read it."""

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """The weights [n, d_in] of the outputs ids [n], as an embedding tied to them reads them."""

    @abstractmethod
    def storage(self) -> tuple[Tensor, Tensor | None]:
        """The weight's levels or numbers, and its scales."""

    @abstractmethod
    def reference(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out] with torch's operations: the definition, rounded to x's type."""

    @staticmethod
    def product(modules: Sequence[PanelLinear]) -> LinearProduct:
        """The product of modules of this kind that share an input."""
        return LinearProduct(modules)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out]."""
        return self.product([self])(x)[0]


class PanelEmbedding(nn.Module):
    """Stands in for an nn.Embedding whose weight is tied to an LM head in panels: reads its rows there.

    What is read is multiplied by `embed_scale`, as Gemma does.
    """

    def __init__(self, head: PanelLinear, embed_scale: float = 1.0) -> None:
        super().__init__()
        self.head, self.embed_scale = head, embed_scale
        self.embedding_dim = head.in_features

    @property
    def weight(self) -> Tensor:
        """A copy of the weight [vocab, hidden]."""
        return self.head.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids [..., num_tokens] -> [..., num_tokens, hidden]."""
        rows = self.head.rows(token_ids.reshape(-1)).view(*token_ids.shape, self.embedding_dim)
        return rows if self.embed_scale == 1 else rows * self.embed_scale


class NativePart(ctypes.Structure):
    """A module of a product as the kernels take it."""

    _fields_ = (
        *((name, c_void_p) for name in ("weights", "scales", "bias", "y")),
        *((name, c_int64) for name in ("y_stride", "d_out", "add")),
        ("rows", c_void_p),  # the kernels' own
    )


class LinearProduct:
    """The product of one input with the weights of several modules of one kind, in one call."""

    def __init__(self, modules: Sequence[PanelLinear]) -> None:
        self.modules = tuple(modules)  # their memory must outlive the pointers
        self._kernel, self._d_in = modules[0].kernel, modules[0].in_features
        self.parts = (NativePart * len(modules))(*map(_to_part, modules))

    @staticmethod
    def of(modules: Sequence[nn.Module]) -> LinearProduct | None:
        """The product of these modules, or None if they are not all in panels of one kind."""
        in_panels = [module for module in modules if isinstance(module, PanelLinear)]
        kernels = {module.kernel for module in in_panels}
        is_one = len(in_panels) == len(modules) and len(kernels) == 1 and None not in kernels
        return in_panels[0].product(in_panels) if is_one else None

    def native(self, like: Tensor) -> NativeFunction | None:
        """The kernel for inputs of this type and device, or None."""
        return native_function(self._kernel, like) if self._kernel else None

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x [..., d_in] -> y [..., d_out] of each module."""
        outputs = self.new_outputs(x)
        self.compute(x, outputs, add=False)
        return outputs

    def new_outputs(self, x: Tensor) -> list[Tensor]:
        """Room for y [..., d_out] of each module."""
        return [x.new_empty(*x.shape[:-1], module.out_features) for module in self.modules]

    def add_(self, x: Tensor, residual: Tensor) -> None:
        """residual += W x + b, in place, for a single module; natively rounded once."""
        self.compute(x, [residual], add=True)

    def compute(self, x: Tensor, outputs: Sequence[Tensor], *, add: bool) -> None:
        """Writes each module's W x + b to its output [..., d_out], or adds it."""
        native = self.native(x)
        if native is None:
            for module, y in zip(self.modules, outputs, strict=True):
                y.copy_(y + module.reference(x) if add else module.reference(x))
            return
        x = self.aim(x, outputs, add=add)
        native(ctypes.byref(Tokens.of(x)), self.parts, c_int64(len(self.parts)), c_void_p())

    def aim(self, x: Tensor, outputs: Sequence[Tensor], *, add: bool) -> Tensor:
        """Has the native parts write to these outputs; returns x as [num_tokens, d_in], for the kernel."""
        x = x.reshape(-1, x.shape[-1])
        if x.stride(-1) != 1:
            x = x.contiguous()
        assert x.shape[1] == self._d_in
        for part, module, y in zip(self.parts, self.modules, outputs, strict=True):
            assert y.dtype == x.dtype and y.is_contiguous() and y.numel() == len(x) * part.d_out
            assert module.bias is None or module.bias.dtype == x.dtype
            part.y, part.add = y.data_ptr(), add
        return x


def _to_part(module: PanelLinear) -> NativePart:
    tensors = (*module.storage(), module.bias)
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    return NativePart(*pointers, None, module.out_features, module.out_features, 0, None)
