"""Triton's interpreter without the work that changes nothing, which is nearly half of what it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import triton.language as tl
from triton.runtime import interpreter


def interpret_quickly() -> None:
    """Has interpreted kernels give what they give, sooner; call it once."""
    builder = interpreter.interpreter_builder
    # Of each sum and product it finds out whether it overflows, and tells nobody unless it debugs.
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = _once(interpreter._patch_lang)


def _once(patch: Callable[[object], object]) -> Callable[[object], object]:
    """Patches the language for the kernel that is launched, and not again for each function that it calls."""

    def patch_if_needed(function: object) -> object:
        if any(tl.core.is_builtin(language.load) for language in (tl, tl.core)):
            return patch(function)
        return interpreter._LangPatchScope()

    return patch_if_needed
