"""Triton's interpreter without the work that changes nothing, which is most of what it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def interpret_quickly() -> None:
    """Has interpreted kernels give what they give, sooner; call it once."""
    builder = interpreter.interpreter_builder
    # Of each sum and product it finds out whether it overflows, and tells nobody unless it debugs.
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = _once(interpreter._patch_lang)
    # It makes the same few types and shapes for every number that it computes.
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    tl.core.block_type.__init__ = _kept(tl.core.block_type.__init__)
    tl.core.tensor.__init__ = _init_tensor
    TritonSemantic.broadcast_impl_value = _unless_alike(TritonSemantic.broadcast_impl_value)


def _once(patch: Callable[[object], object]) -> Callable[[object], object]:
    """Patches the language for the kernel that is launched, and not again for each function that it calls."""

    def patch_if_needed(function: object) -> object:
        if any(tl.core.is_builtin(language.load) for language in (tl, tl.core)):
            return patch(function)
        return interpreter._LangPatchScope()

    return patch_if_needed


def _by_name(find: Callable[[tl.dtype], object]) -> Callable[[tl.dtype], object]:
    """Finds what stands for a type once."""
    found: dict[str, object] = {}

    def find_once(dtype: tl.dtype) -> object:
        if dtype.name not in found:
            found[dtype.name] = find(dtype)
        return found[dtype.name]

    return find_once


def _kept(init: Callable[..., None]) -> Callable[..., None]:
    """Checks and names a type of blocks once; nothing changes one."""
    kept: dict[tuple[object, ...], dict[str, object]] = {}

    def init_block_type(block_type: tl.block_type, element_ty: tl.dtype, shape: Iterable[object]) -> None:
        place = element_ty.address_space if element_ty.is_ptr() else None
        sizes = (size.value if isinstance(size, tl.constexpr) else size for size in shape)
        key = (element_ty.name, place, *sizes)
        if key not in kept:
            init(block_type, element_ty, shape)
            kept[key] = vars(block_type)
        vars(block_type).update(kept[key])

    return init_block_type


def _init_tensor(tensor: tl.tensor, handle: object, type: tl.dtype) -> None:
    """As `tl.tensor` does it."""
    tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
    tensor.shape, tensor.numel = _extent(tuple(type.shape) if type.is_block() else ())


@cache
def _extent(sizes: tuple[int, ...]) -> tuple[tl.tuple, tl.constexpr]:
    """The shape and the number of elements of a tensor."""
    numel = 1
    for size in sizes:
        numel *= size
    return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(numel)


def _unless_alike(broadcast: Callable[..., tuple[object, object]]) -> Callable[..., tuple[object, object]]:
    """Leaves operands of one shape as they are."""

    def broadcast_if_needed(semantic: object, left: tl.tensor, right: tl.tensor) -> tuple[object, object]:
        if left.shape.values == right.shape.values:
            return left, right
        return broadcast(semantic, left, right)

    return broadcast_if_needed
