"""Mutations that know the formats: of JSON, of safetensors files, and of protobuf messages by their descriptors."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Sequence
from typing import Any

from fuzz_artifacts import Artifact
from fuzz_requests import REQUESTS
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

STRANGE_JSON: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 64, 1 << 31, 1 << 62, 1 << 63, 0.5, -0.0, 1e308, 5e-324),
    *(
        "",
        "a",
        "\0",
        "..",
        "../x",
        "😀",
        "q_proj",
        ".*",
        "(a+)+$",
        "all-linear",
        "LORA",
        "F32",
        "BF16",
        "I8",
        "x" * 300,
    ),
    *(
        [],
        {},
        [[]],
        [0, 0],
        [0, 8],
        [1 << 63, 0],
        {"a": {}},
        ["a"] * 50,
        {"q_proj": 3},
        ["q_proj", "down_proj"],
    ),
)
STRANGE_NUMBERS = (
    *(math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 3.4e38, 1e6, 1.01e6, -1e6, 65504.0, 65536.0),
)
STRANGE_TEXTS = (
    "",
    "\0",
    "a",
    "perl",
    "..",
    "../x",
    "a/b",
    "ä",
    "😀",
    "\u202e",
    "x" * 63,
    "x" * 64,
    "x" * 5000,
    "-",
    "%s",
)
STRANGE_INTEGERS = (
    0,
    1,
    -1,
    2,
    15,
    16,
    17,
    64,
    65,
    1023,
    1024,
    4095,
    4096,
    1 << 31,
    (1 << 31) - 1,
    (1 << 32) - 1,
    (1 << 63) - 1,
)


def mutate_artifact(data: bytes, draws: random.Random) -> bytes:
    """One change of configuration, header or data, or two or three."""
    artifact = Artifact.unpack(data)
    config, weights = artifact.config, artifact.weights
    for _ in range(draws.choice((1, 1, 1, 2, 3))):
        if draws.random() < 0.4:
            config = _mutate_text(config, draws)
        else:
            weights = _mutate_weights(weights, draws)
    kind = artifact.kind if draws.random() < 0.97 else 1 - artifact.kind
    return Artifact(kind, config, weights).pack()


def mutate_request(data: bytes, draws: random.Random) -> bytes:
    """One to four changes of fields of a request, or of another kind's request."""
    kind = (data[0] if data else 0) % len(REQUESTS)
    if draws.random() < 0.05:
        kind = draws.randrange(len(REQUESTS))
    message = REQUESTS[kind]()
    try:
        message.MergeFromString(data[1:])
    except DecodeError:
        message.Clear()
    for _ in range(draws.randint(1, 4)):
        _mutate_message(message, draws)
    return bytes([kind]) + message.SerializeToString()


def _mutate_text(text: bytes, draws: random.Random) -> bytes:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _mutate_bytes(text, draws)
    if draws.random() < 0.1:
        return _mutate_bytes(text, draws)
    encoded = json.dumps(_mutate_json(value, draws)).encode()
    if draws.random() < 0.03 and encoded.startswith(b"{") and len(encoded) > 2:  # a key twice
        return encoded[:-1] + b", " + encoded[1:]
    return encoded


def _mutate_json(value: Any, draws: random.Random) -> Any:
    """The value with one thing in it changed, left out, doubled or under another key."""
    if isinstance(value, dict) and value and draws.random() < 0.85:
        key = draws.choice(list(value))
        changed = dict(value)
        match draws.randrange(6):
            case 0:
                del changed[key]
            case 1:
                changed[draws.choice([*(s for s in STRANGE_JSON if isinstance(s, str)), key + "x"])] = value[
                    key
                ]
            case _:
                changed[key] = _mutate_json(value[key], draws)
        return changed
    if isinstance(value, list) and value and draws.random() < 0.7:
        index = draws.randrange(len(value))
        rest = value[index + draws.randrange(2) :]
        return [*value[:index], _mutate_json(value[index], draws), *rest]
    if type(value) is int and draws.random() < 0.5:
        return value + draws.choice((-1, 1, 8, -8, 4, 1 << 31, 1 << 62))
    return draws.choice(STRANGE_JSON)


def _mutate_weights(weights: bytes, draws: random.Random) -> bytes:
    length = int.from_bytes(weights[:8], "little")
    header, data = weights[8 : 8 + length], weights[8 + length :]
    match draws.randrange(6):
        case 0:
            return _mutate_bytes(weights, draws)
        case 1:
            data = _mutate_bytes(data, draws)
        case 2 | 3:
            data = _put_number(data, draws)
        case 4:
            said = draws.choice(
                (0, len(header) - 1, len(header) + 1, 1 << 20, (1 << 20) + 1, 1 << 63, (1 << 64) - 1)
            )
            return max(said, 0).to_bytes(8, "little") + header + data
        case _:
            header = _mutate_text(header, draws)
    return len(header).to_bytes(8, "little") + header + data


def _put_number(data: bytes, draws: random.Random) -> bytes:
    """A strange float somewhere, of four bytes or of the two of bfloat16."""
    size = draws.choice((2, 4))
    if len(data) < 4:
        return data
    at = draws.randrange(len(data) // size) * size
    number = struct.pack("<f", draws.choice(STRANGE_NUMBERS))[-size:]
    return data[:at] + number + data[at + size :]


def _mutate_bytes(data: bytes, draws: random.Random) -> bytes:
    at = draws.randrange(len(data) + 1)
    match draws.randrange(4):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + draws.randbytes(draws.randint(1, 16)) + data[at:]
        case 2:
            return data[:at] + draws.randbytes(1) + data[at + 1 :]
        case _:
            return data[:at] + data[at + draws.randint(1, 64) :]


def _mutate_message(message: Message, draws: random.Random) -> None:
    field = draws.choice(message.DESCRIPTOR.fields)
    if draws.random() < 0.1:
        message.ClearField(field.name)
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        for _ in range(draws.choice((1, 1, 1, 1100))):
            getattr(message, field.name)[abs(draws.choice(STRANGE_INTEGERS)) & 0xFFFFFFFF] = draws.choice(
                STRANGE_NUMBERS
            )
    elif field.is_repeated:
        _mutate_repeated(message, field, draws)
    elif field.message_type is not None:
        part = getattr(message, field.name)
        part.SetInParent()
        if draws.random() < 0.9:
            _mutate_message(part, draws)
    else:
        setattr(message, field.name, _strange_value(field, draws))


def _mutate_repeated(message: Message, field: FieldDescriptor, draws: random.Random) -> None:
    values = getattr(message, field.name)
    for _ in range(draws.choice((1, 1, 2, 17, 70))):
        if field.message_type is not None:
            _mutate_message(values.add(), draws)
        else:
            values.append(_strange_value(field, draws))


def _strange_value(field: FieldDescriptor, draws: random.Random) -> Any:
    choices: Sequence[Any]
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            choices = STRANGE_TEXTS
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            choices = (*STRANGE_NUMBERS, 0.5, 1.0, 2.0, -1.0)
        case FieldDescriptor.CPPTYPE_BOOL:
            choices = (False, True)
        case FieldDescriptor.CPPTYPE_UINT32:
            choices = [number & 0xFFFFFFFF for number in STRANGE_INTEGERS]
        case FieldDescriptor.CPPTYPE_INT64:
            choices = (*STRANGE_INTEGERS, -(1 << 63))
        case _:
            choices = [number for number in STRANGE_INTEGERS if -(1 << 31) <= number < 1 << 31]
    return draws.choice(choices)
