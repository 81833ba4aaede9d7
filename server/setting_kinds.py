"""The kinds of values that settings have: how each is read from text, and shown in --help."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusionserve.artifact_folders import ADAPTER_CONFIG, FUSION_CONFIG
from fusionserve.errors import StartupError
from fusionserve.limits import RESERVED_NAMES, is_name
from fusionserve.server.listen_address import ListenAddress

SIZE_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}
TIME_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
LONGEST_S = 500 * 3600  # gRPC counts milliseconds in 32 bits
SWITCH_VALUES = {"on": True, "true": True, "yes": True, "1": True} | {
    "off": False,
    "false": False,
    "no": False,
    "0": False,
}
QUANTITY = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
OFF = "off"


@dataclass(frozen=True, slots=True)
class Kind:
    """`parse` turns text into a value or raises ValueError with the reason; `show` is its inverse."""

    metavar: str
    parse: Callable[[str], Any]
    show: Callable[[Any], str] = str


def parse_size(text: str) -> int:
    """Bytes of 1048576, 512MiB or 1.5GB."""
    match = QUANTITY.fullmatch(text.strip())
    unit = SIZE_UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a size such as 512MiB")
    return round(float(match[1]) * unit)


def size(low: int, high: int) -> Kind:
    """Sizes from `low` to `high` bytes."""

    def parse(text: str) -> int:
        num_bytes = parse_size(text)
        if not low <= num_bytes <= high:
            raise ValueError(f"{text!r} is not from {show_size(low)} to {show_size(high)}")
        return num_bytes

    return Kind("SIZE", parse, show_size)


def show_size(size: int) -> str:
    """The shortest exact form with a binary unit."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size and size % unit == 0:
            return f"{size // unit}{name}"
    return str(size)


def parse_seconds(text: str) -> float:
    """Seconds of 30, 1.5s, 500ms or 10m, up to 500h."""
    match = QUANTITY.fullmatch(text.strip())
    unit = TIME_UNITS.get(match[2]) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a duration such as 30s")
    seconds = float(match[1]) * unit
    if seconds > LONGEST_S:
        raise ValueError(f"{text!r} is longer than {LONGEST_S // 3600}h")
    return seconds


def parse_time_limit(text: str) -> float:
    """Seconds, more than none."""
    seconds = parse_seconds(text)
    if not seconds > 0:
        raise ValueError(f"{text!r} is no time at all")
    return seconds


def parse_switch(text: str) -> bool:
    """True of on, false of off."""
    value = SWITCH_VALUES.get(text.strip().lower())
    if value is None:
        raise ValueError(f"{text!r} is not on or off")
    return value


def integer(low: int, high: int = 2**31 - 1) -> Kind:
    """Whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            raise ValueError(f"{value} is not from {low} to {high}")
        return value

    return Kind("N", parse)


def parse_number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a finite number")
    return value


def choice(*names: str) -> Kind:
    """One of a few words."""

    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(f"{text!r} is not one of {', '.join(names)}")
        return text

    return Kind("|".join(names), parse)


def parse_address(text: str) -> str:
    """A HOST:PORT that a listener can be bound to."""
    try:
        return str(ListenAddress.parse(text))
    except StartupError as error:
        raise ValueError(error.message) from None


def parse_address_or_off(text: str) -> str:
    """A HOST:PORT, or off."""
    return OFF if text.strip().lower() == OFF else parse_address(text)


def parse_model(text: str) -> str:
    """A folder with a model in it, or what may be a hub id."""
    folder = parse_path(text)
    if (folder / "config.json").is_file():
        return str(folder)
    if folder.exists():
        raise ValueError(f"{text!r} is not a model folder: it has no config.json")
    if not HUB_ID.fullmatch(text):
        raise ValueError(f"there is no model folder {text!r}")
    return text


def parse_target(text: str) -> str:
    """What a client can be pointed at: HOST:PORT, or another form of gRPC's."""
    if not text.strip():
        raise ValueError(f"{text!r} names no server")
    return parse_text(text)


def parse_text(text: str) -> str:
    """One that can be sent: a command line and the environment may have bytes that are no characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it is not UTF-8") from None
    return text


def parse_path(text: str) -> Path:
    """A path, whatever is there."""
    if not text:  # as of a variable that is not set; Path would take it for the working directory
        raise ValueError("the path is empty")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"there is no home folder for {text!r}") from None


def parse_folder(text: str) -> Path:
    """A folder that exists."""
    folder = parse_path(text)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {text!r}")
    return folder


def parse_adapter(text: str) -> tuple[str, Path]:
    """NAME=PATH of an adapter that exists."""
    return _parse_named(text, "an adapter", ADAPTER_CONFIG)


def parse_fusion(text: str) -> tuple[str, Path]:
    """NAME=PATH of a fusion that exists."""
    return _parse_named(text, "a fusion", FUSION_CONFIG)


def _parse_named(text: str, what: str, config_file: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not path:
        raise ValueError(f"{text!r} is not NAME=PATH")
    if not is_name(name):
        raise ValueError(f"{name!r} is not a name: 1 to 63 of a-z 0-9 . _ -, starting with a letter or digit")
    if name in RESERVED_NAMES:
        raise ValueError(f"{name!r} is a reserved name")
    folder = parse_folder(path)
    if not (folder / config_file).is_file():
        raise ValueError(f"{path!r} is not {what} folder: it has no {config_file}")
    return name, folder


def parse_weights(text: str) -> dict[str, float]:
    """NAME=WEIGHT pairs, separated by commas."""
    weights: dict[str, float] = {}
    for pair in parse_text(text).split(","):
        name, equals, weight = pair.strip().partition("=")
        if not equals or not name:
            raise ValueError(f"{pair!r} is not NAME=WEIGHT")
        if name in weights:
            raise ValueError(f"{name!r} is given twice")
        weights[name] = parse_number(weight)
    return weights


def parse_shares(text: str) -> dict[str, float]:
    """NAME=WEIGHT pairs whose weights are above 0."""
    shares = parse_weights(text)
    for name, weight in shares.items():
        if not weight > 0:
            raise ValueError(f"the weight of {name!r} is not above 0")
    return shares


TEXT = Kind("TEXT", parse_text)
NAME = Kind("NAME", parse_text)
FILE = Kind("FILE", parse_path)
NUMBER = Kind("X", parse_number, "{:g}".format)
SECONDS = Kind("DURATION", parse_seconds, "{:g}s".format)
TIME_LIMIT = Kind("DURATION", parse_time_limit, "{:g}s".format)
SIZE = Kind("SIZE", parse_size, show_size)
SWITCH = Kind("on|off", parse_switch, lambda value: "on" if value else "off")
ADDRESS = Kind("HOST:PORT", parse_address)
ADDRESS_OR_OFF = Kind("HOST:PORT|off", parse_address_or_off)
MODEL = Kind("DIR|HUB_ID", parse_model)
FOLDER = Kind("DIR", parse_folder)
TARGET = Kind("HOST:PORT", parse_target)
ADAPTER = Kind("NAME=PATH", parse_adapter)
FUSION = Kind("NAME=PATH", parse_fusion)
WEIGHTS = Kind("NAME=WEIGHT,...", parse_weights)
SHARES = Kind("NAME=WEIGHT,...", parse_shares)
