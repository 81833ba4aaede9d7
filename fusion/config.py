"""fusion_config.json: what a fusion is made of, read strictly and written in one form.

    {"format_version": 1, "name": "...", "base_model": {"name": "...", "fingerprint": "..."},
     "members": [{"name": "...", "sha256": "...", "scalings_sha256": "..."}, ...],
     "modules": ["model.layers.0.self_attn.q_proj", ...], "scope": "layer", "d_key": 64, "member_keys": true,
     "value": {"kind": "none"}, "temperature": 1.0, "base_member": false, "training": {...}}

The order of the members is the order of their weights. `sha256` is of a member's weights file; `scalings_sha256`, which
may be missing, of a line `PATH SCALING` for every module that it adapts, sorted by path, the scaling in hexadecimal as
Python's float.hex() writes it. `modules` are the paths at which the fusion acts; elsewhere its members add nothing.
With scope `layer` the first of a layer's modules to be computed has the attention.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

from fusionserve.adapters.artifact_errors import quoted
from fusionserve.adapters.strict_json import StrictJsonError, parse_json_object
from fusionserve.artifact_folders import FUSION_CONFIG
from fusionserve.errors import ArtifactError
from fusionserve.limits import is_artifact_name

FORMAT_VERSION = 1
MAX_CONFIG_BYTES = 1 << 20
MAX_MEMBERS = 64
MAX_KEY_WIDTH = 4096
MAX_VALUE_RANK = 4096
MAX_MODULES = 8192
MAX_TEMPERATURE = 1e6
_CONFIG_DEPTH = 16
_DIGEST = re.compile(r"[0-9a-f]{64}")

_T = TypeVar("_T")
_E = TypeVar("_E", bound=Enum)


class Scope(Enum):
    """Where the attentions are: at every module, or one for all modules of a layer."""

    MODULE = "module"
    LAYER = "layer"


class ValueKind(Enum):
    """What V is: left out, a diagonal, or the identity plus a matrix of low rank."""

    NONE = "none"
    DIAGONAL = "diagonal"
    LOW_RANK = "low_rank"


@dataclass(frozen=True, slots=True)
class FusionMember:
    """An adapter by name, and what it was when the fusion was trained."""

    name: str
    digest: str  # sha256 (hex) of its weights file
    scalings_digest: str | None = None  # LoRAWeights.scalings_digest; None: the fusion does not tell

    def to_fields(self) -> dict[str, str]:
        """As the file has it."""
        fields = {"name": self.name, "sha256": self.digest}
        return fields if self.scalings_digest is None else {**fields, "scalings_sha256": self.scalings_digest}


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionConfig:
    """Everything but the trained weights; `training` is a summary for people."""

    name: str
    base_model: str
    base_fingerprint: str
    members: tuple[FusionMember, ...]
    modules: tuple[str, ...]
    scope: Scope = Scope.LAYER
    d_key: int = 64
    member_keys: bool = True
    value: ValueKind = ValueKind.NONE
    value_rank: int = 0  # for LOW_RANK only
    temperature: float = 1.0
    base_member: bool = False
    training: Mapping[str, object] = field(default_factory=dict)

    @property
    def weight_names(self) -> tuple[str, ...]:
        """What the columns of the fusion weights are called: the members, then `base` if it may be chosen."""
        return (*(member.name for member in self.members), *(("base",) if self.base_member else ()))

    def to_json(self) -> str:
        """The file's text."""
        value: dict[str, object] = {"kind": self.value.value}
        if self.value is ValueKind.LOW_RANK:
            value["rank"] = self.value_rank
        fields = {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "base_model": {"name": self.base_model, "fingerprint": self.base_fingerprint},
            "members": [member.to_fields() for member in self.members],
            "modules": list(self.modules),
            "scope": self.scope.value,
            "d_key": self.d_key,
            "member_keys": self.member_keys,
            "value": value,
            "temperature": self.temperature,
            "base_member": self.base_member,
            "training": dict(self.training),
        }
        return json.dumps(fields, indent=2) + "\n"


def parse_fusion_config(data: bytes) -> FusionConfig:
    """Checks the bytes of a fusion_config.json. Raises ArtifactError: CONFIG_MALFORMED, FUSION_VERSION_UNSUPPORTED."""
    if len(data) > MAX_CONFIG_BYTES:
        raise _malformed(f"it is over {MAX_CONFIG_BYTES} bytes")
    try:
        fields = _Fields("", parse_json_object(data, max_depth=_CONFIG_DEPTH))
    except StrictJsonError as error:
        raise _malformed(str(error)) from None
    version = fields.take("format_version", int)
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"the fusion's format version is {version}, this server reads {FORMAT_VERSION}",
            reason="FUSION_VERSION_UNSUPPORTED",
        )
    base, value = fields.take_object("base_model"), fields.take_object("value")
    kind = _take_enum(value, "kind", ValueKind)
    config = FusionConfig(
        name=fields.take("name", str),
        base_model=base.take("name", str),
        base_fingerprint=base.take("fingerprint", str),
        members=tuple(_to_member(item) for item in fields.take("members", list)),
        modules=tuple(_to_module(item) for item in fields.take("modules", list)),
        scope=_take_enum(fields, "scope", Scope),
        d_key=fields.take("d_key", int),
        member_keys=fields.take("member_keys", bool),
        value=kind,
        value_rank=value.take("rank", int) if kind is ValueKind.LOW_RANK else 0,
        temperature=fields.take_number("temperature"),
        base_member=fields.take("base_member", bool),
        training=fields.take("training", dict),
    )
    for taken in (fields, base, value):
        taken.refuse_rest()
    _check_ranges(config)
    return config


class _Fields:
    """The fields of one object; each is taken once, and none may be left."""

    def __init__(self, path: str, fields: Mapping[str, object]) -> None:
        self._path = path
        self._left = dict(fields)

    def take(self, key: str, kind: type[_T]) -> _T:
        if key not in self._left:
            raise _malformed(f"it has no {self._path}{key}")
        value = self._left.pop(key)
        if type(value) is not kind:
            raise _malformed(f"{self._path}{key} is not of the type {kind.__name__}")
        return value

    def take_number(self, key: str) -> float:
        if type(self._left.get(key)) is int:
            try:
                return float(self.take(key, int))
            except OverflowError:
                raise _malformed(f"{self._path}{key} is too large") from None
        return self.take(key, float)

    def take_object(self, key: str) -> _Fields:
        return _Fields(f"{key}.", self.take(key, dict))

    def refuse_rest(self) -> None:
        for key in self._left:
            raise _malformed(f"{self._path}{quoted(key)} is not known to this version")


def _take_enum(fields: _Fields, key: str, kind: type[_E]) -> _E:
    text = fields.take(key, str)
    try:
        return kind(text)
    except ValueError:
        raise _malformed(f"{key} is {quoted(text)}") from None


def _to_member(item: object) -> FusionMember:
    if not isinstance(item, dict):
        raise _malformed("a member is not an object")
    fields = _Fields("members.", item)
    scalings_digest = fields.take("scalings_sha256", str) if "scalings_sha256" in item else None
    member = FusionMember(fields.take("name", str), fields.take("sha256", str), scalings_digest)
    fields.refuse_rest()
    if not is_artifact_name(member.name):
        raise _malformed(f"a member is named {quoted(member.name)}, which no adapter can be")
    for key, digest in (("sha256", member.digest), ("scalings_sha256", member.scalings_digest)):
        if digest is not None and not _DIGEST.fullmatch(digest):
            raise _malformed(f"the {key} of member {member.name} is not 64 hexadecimal digits")
    return member


def _to_module(item: object) -> str:
    if not isinstance(item, str) or not item:
        raise _malformed("a module is not a path")
    return item


def _check_ranges(config: FusionConfig) -> None:
    names = [member.name for member in config.members]
    ranges = {
        f"1 to {MAX_MEMBERS} members": 1 <= len(names) <= MAX_MEMBERS,
        "each member once": len(set(names)) == len(names),
        f"1 to {MAX_MODULES} modules": 1 <= len(config.modules) <= MAX_MODULES,
        "each module once": len(set(config.modules)) == len(config.modules),
        f"a d_key from 1 to {MAX_KEY_WIDTH}": 1 <= config.d_key <= MAX_KEY_WIDTH,
        f"a temperature above 0, to {MAX_TEMPERATURE:g}": 0 < config.temperature <= MAX_TEMPERATURE,
        f"a value rank from 1 to {MAX_VALUE_RANK}": config.value is not ValueKind.LOW_RANK
        or 1 <= config.value_rank <= MAX_VALUE_RANK,
    }
    for wanted, is_met in ranges.items():
        if not is_met:
            raise _malformed(f"it should have {wanted}")


def _malformed(problem: str) -> ArtifactError:
    return ArtifactError(f"{FUSION_CONFIG} is wrong: {problem}", reason="CONFIG_MALFORMED")
