"""Range checks of single values; a failure is an InvalidRequestError that names the field and the range."""

from __future__ import annotations

import math
import re
from collections.abc import Sized

from fusionserve.errors import InvalidRequestError
from fusionserve.limits import MAX_PATH_LENGTH, MAX_PATH_PARTS, is_artifact_name

_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_between(field: str, value: float, low: float, high: float) -> None:
    """Raises NOT_FINITE or OUT_OF_RANGE unless low <= value <= high."""
    _check_finite(field, value)
    if not low <= value <= high:
        raise _out_of_range(field, f"must be between {low:g} and {high:g}", low, high)


def check_above(field: str, value: float, low: float, high: float) -> None:
    """Raises NOT_FINITE or OUT_OF_RANGE unless low < value <= high."""
    _check_finite(field, value)
    if not low < value <= high:
        raise _out_of_range(field, f"must be above {low:g} and at most {high:g}", low, high)


def check_at_least(field: str, value: float, low: float) -> None:
    """Raises NOT_FINITE or OUT_OF_RANGE unless value >= low."""
    _check_finite(field, value)
    if not value >= low:
        raise InvalidRequestError(
            f"{field} must be at least {low:g}",
            field=field,
            reason="OUT_OF_RANGE",
            metadata={"min": f"{low:g}"},
        )


def check_count(field: str, entries: Sized, high: int, reason: str) -> None:
    """Raises `reason` if there are more than `high` entries."""
    if len(entries) > high:
        raise InvalidRequestError(
            f"{field} has {len(entries)} entries; at most {high} are allowed",
            field=field,
            reason=reason,
            metadata={"max": str(high)},
        )


def check_length(field: str, text: str, low: int, high: int) -> None:
    """Raises LENGTH_OUT_OF_RANGE unless the text has `low` to `high` characters."""
    if not low <= len(text) <= high:
        raise InvalidRequestError(
            f"{field} must have {low} to {high} characters",
            field=field,
            reason="LENGTH_OUT_OF_RANGE",
            metadata={"min": str(low), "max": str(high)},
        )


def check_name(field: str, name: str, what: str = "adapter") -> None:
    """Raises ADAPTER_ID_INVALID, or FUSION_ID_INVALID, unless `name` may be one's name."""
    if not is_artifact_name(name):
        raise InvalidRequestError(
            f"{field} must be 1 to 63 of a-z 0-9 . _ -, start with a letter or digit, have no double dot, "
            "and be neither base nor other, which are reserved",
            field=field,
            reason=f"{what.upper()}_ID_INVALID",
        )


def check_new_name(field: str, name: str, model_name: str, what: str = "adapter") -> None:
    """Raises as `check_name`, also if `name` is that of the model."""
    check_name(field, name, what)
    if name == model_name:
        raise InvalidRequestError(
            f"{field} is the name of the base model", field=field, reason=f"{what.upper()}_ID_INVALID"
        )


def check_path(field: str, path: str, what: str = "adapter") -> None:
    """Raises ADAPTER_PATH_INVALID, or FUSION_PATH_INVALID, unless `path` is relative and names every folder."""
    parts = path.split("/")
    is_plain = path.isprintable() and "\\" not in path and len(path) <= MAX_PATH_LENGTH
    if not is_plain or len(parts) > MAX_PATH_PARTS or any(part in ("", ".", "..") for part in parts):
        raise InvalidRequestError(
            f"{field} must be relative to one of the server's {what} folders, at most {MAX_PATH_PARTS} deep, "
            'without empty parts, "." and ".."',
            field=field,
            reason=f"{what.upper()}_PATH_INVALID",
        )


def check_digest(field: str, digest: str) -> None:
    """Raises DIGEST_INVALID unless it is a sha256 in lower-case hex."""
    if not _SHA256.fullmatch(digest):
        raise InvalidRequestError(
            f"{field} must be 64 hex digits in lower case", field=field, reason="DIGEST_INVALID"
        )


def _check_finite(field: str, value: float) -> None:
    if not math.isfinite(value):
        raise InvalidRequestError(f"{field} must be a finite number", field=field, reason="NOT_FINITE")


def _out_of_range(field: str, rule: str, low: float, high: float) -> InvalidRequestError:
    return InvalidRequestError(
        f"{field} {rule}",
        field=field,
        reason="OUT_OF_RANGE",
        metadata={"min": f"{low:g}", "max": f"{high:g}"},
    )
