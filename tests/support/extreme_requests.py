"""Every field of every request at its extremes, made from the descriptors of the API: a new field is in it from its
first day.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from bad_requests import generation
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from fusionserve.v1 import adapter_pb2, inference_pb2

NAN, INF = math.nan, math.inf

FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 3.4e38, -3.4e38, INF, -INF, NAN)
STRINGS = (
    "",
    "\0",
    "a" * (1 << 20),
    "../../etc/passwd",
    "😀" * 300,
    "\u202e\u0301\u200d",
    "%n%s{0}",
    "' OR 1=1 --",
    "\ufffe",
)
BYTES = (b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80")
NUMBERS = {
    FieldDescriptor.TYPE_UINT32: (0, 1, 2**31, 2**32 - 1),
    FieldDescriptor.TYPE_INT32: (0, 1, -1, 2**31 - 1, -(2**31)),
    FieldDescriptor.TYPE_INT64: (0, 1, -1, 2**63 - 1, -(2**63)),
    FieldDescriptor.TYPE_FLOAT: FLOATS,
    FieldDescriptor.TYPE_BOOL: (False, True),
    FieldDescriptor.TYPE_ENUM: (0, 1, 3, 4, 99, -1, 2**31 - 1, -(2**31)),
    FieldDescriptor.TYPE_STRING: STRINGS,
}
MANY = 5000


def systematic() -> list[tuple[str, str, bytes]]:
    """(name, method, request) of every field at each of its extremes; the answer may be OK or an error."""
    cases: list[tuple[str, str, bytes]] = []
    for file in (inference_pb2.DESCRIPTOR, adapter_pb2.DESCRIPTOR):
        for service in file.services_by_name.values():
            for method in service.methods:
                cases += list(_of_method(f"/{service.full_name}/{method.name}", method))
    return cases


def _of_method(path: str, method: MethodDescriptor) -> Iterator[tuple[str, str, bytes]]:
    base = _valid(method)
    for name, change in _changes(method.input_type, ""):
        yield f"{method.name}.{name}", path, base + change
    yield f"{method.name} of nothing", path, b""


def _valid(method: MethodDescriptor) -> bytes:
    """A request that works, as far as it takes little: fields at their extremes are merged into it."""
    message = GetMessageClass(method.input_type)()
    if method.name == "Generate":
        message.MergeFrom(generation())
    elif method.name == "StreamGenerate":
        message.request.MergeFrom(generation())  # type: ignore[attr-defined]
    elif "name" in method.input_type.fields_by_name:
        message.name = "nobody"  # type: ignore[attr-defined]
    return message.SerializeToString()


def _changes(descriptor: Descriptor, prefix: str) -> Iterator[tuple[str, bytes]]:
    for field in descriptor.fields:
        name = f"{prefix}{field.name}"
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            yield f"{name} empty", _wrap(field, b"")
            for inner, change in _changes(field.message_type, f"{name}."):
                yield inner, _wrap(field, change)
            if field.is_repeated:
                yield f"{name} x {MANY}", _wrap(field, b"") * MANY
            continue
        values: Sequence[Any] = NUMBERS[field.type]
        message = GetMessageClass(descriptor)
        for value in values:
            filled = message()
            if field.is_repeated:
                getattr(filled, field.name).append(value)
            else:
                setattr(filled, field.name, value)
            yield f"{name} = {str(value)[:24]!r}", filled.SerializeToString()
        if field.type == FieldDescriptor.TYPE_STRING:
            for raw in BYTES:
                yield f"{name} = {raw!r}", _wrap(field, raw)
        if field.is_repeated:
            yield f"{name} x {MANY}", message(**{field.name: [values[1]] * MANY}).SerializeToString()


def _wrap(field: FieldDescriptor, content: bytes) -> bytes:
    """One length-delimited field."""
    return _varint(field.number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    encoded = b""
    while number > 0x7F:
        encoded += bytes([number & 0x7F | 0x80])
        number >>= 7
    return encoded + bytes([number])
