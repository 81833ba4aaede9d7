"""A JSON reader for files from strangers: one object, each key once, finite numbers, bounded depth."""

from __future__ import annotations

import json
import math
import re
from typing import Never

_NO_BRACKETS = re.compile(r'(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"|[^"\[\]{}]++)++', re.DOTALL)


class StrictJsonError(ValueError):
    """The text breaks a rule; the message is safe to show."""


def parse_json_object(data: bytes, *, max_depth: int) -> dict[str, object]:
    """Parses UTF-8 JSON whose top is an object.

    Raises StrictJsonError for anything else, a repeated key, NaN, Infinity, a number that overflows, and deep
    nesting.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise StrictJsonError("it is not UTF-8 text") from None
    _check_depth(text, max_depth)
    try:
        value = json.loads(
            text, object_pairs_hook=_unique_pairs, parse_constant=_refuse_constant, parse_float=_finite_float
        )
    except StrictJsonError:
        raise
    except (ValueError, RecursionError):  # ValueError: bad syntax, or an integer of thousands of digits
        raise StrictJsonError("it is not valid JSON") from None
    if not isinstance(value, dict):
        raise StrictJsonError("its top level is not an object")
    return value


def _check_depth(text: str, max_depth: int) -> None:
    depth = 0
    for bracket in _NO_BRACKETS.sub("", text):
        if bracket in "[{":
            depth += 1
        elif bracket in "]}":
            depth -= 1
        if depth > max_depth:
            raise StrictJsonError("it is nested too deeply")


def _unique_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise StrictJsonError("an object has the same key twice")
    return unique


def _refuse_constant(_: str) -> Never:
    raise StrictJsonError("it has a number that is not finite")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise StrictJsonError("it has a number that is not finite")
    return value
