"""What must hold of any bytes that lie where an adapter or a fusion should; `tools/fuzz_artifacts.py` makes the bytes.

An input is a kind, a configuration and a weights file. They are served from memory: what is fuzzed reads descriptors.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import safetensors
import torch
from lora_files import VOCAB, make_base_modules
from random_fusions import make_base

from fusionserve.adapters.artifact_directory import ArtifactDirectory
from fusionserve.adapters.lora_loader import MAX_MAGNITUDE, LoadPolicy, load_lora_weights
from fusionserve.adapters.safetensors_file import SafetensorsFile
from fusionserve.errors import ArtifactError, FusionServeError
from fusionserve.fusion.loader import FusionPolicy, read_fusion
from fusionserve.server.status import to_status

ADAPTER, FUSION = 0, 1
MAX_STATUS_BYTES = 4 << 10
BUDGET_BYTES = 1 << 22
UNSAFE = re.compile(r"/(?:work|tmp|home|root|usr|dev|proc)/|\.py\b|Traceback|File \"|0x[0-9a-f]{6,}")
FILES = MappingProxyType(
    {
        ADAPTER: ("adapter_config.json", "adapter_model.safetensors"),
        FUSION: ("fusion_config.json", "fusion_model.safetensors"),
    }
)
_BASE, _FUSION_BASE = make_base_modules(), make_base()
_HEAD = torch.zeros(VOCAB, 16)
_POLICY = LoadPolicy(dtype=torch.bfloat16, max_rank=64)
_FUSION_POLICY = FusionPolicy(dtype=torch.float32, budget_bytes=BUDGET_BYTES, max_rows=512)


@dataclass(frozen=True, slots=True)
class Artifact:
    """One input, as bytes: kind, length of the configuration (4 bytes), configuration, weights file."""

    kind: int
    config: bytes
    weights: bytes

    def pack(self) -> bytes:
        """As one string of bytes."""
        return bytes([self.kind]) + len(self.config).to_bytes(4, "little") + self.config + self.weights

    @classmethod
    def unpack(cls, data: bytes) -> Artifact:
        """Of any bytes."""
        length = int.from_bytes(data[1:5], "little")
        return cls((data[0] if data else 0) % len(FILES), data[5 : 5 + length], data[5 + length :])


class MemoryDirectory:
    """An ArtifactDirectory whose files are in memory."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = files

    def has_file(self, name: str) -> bool:
        """True if there is one."""
        return name in self._files

    def open_file(self, name: str, *, missing_reason: str) -> io.FileIO:
        """The file, from a descriptor without a path."""
        if name not in self._files:
            raise ArtifactError(f"there is no {name}", reason=missing_reason)
        descriptor = os.memfd_create("artifact")
        os.write(descriptor, self._files[name])
        os.lseek(descriptor, 0, os.SEEK_SET)
        return io.FileIO(descriptor, "r")


def try_artifact(data: bytes) -> str:
    """Loads the input; returns the reason why not, or "OK". Raises for whatever must not happen."""
    artifact = Artifact.unpack(data)
    config_name, weights_name = FILES[artifact.kind]
    files = MemoryDirectory({config_name: artifact.config, weights_name: artifact.weights})
    directory = cast(ArtifactDirectory, files)
    try:
        if artifact.kind == ADAPTER:
            _check_adapter(directory)
        else:
            read_fusion(directory, _FUSION_BASE, _FUSION_POLICY)
        outcome = "OK"
    except FusionServeError as error:
        _check_refusal(error)
        outcome = error.reason
    _check_as_safetensors_does(files, weights_name, artifact.weights)
    return outcome


def _check_adapter(directory: ArtifactDirectory) -> None:
    weights = load_lora_weights(
        directory, _BASE, policy=_POLICY, budget_bytes=BUDGET_BYTES, base_weight=lambda path: _HEAD
    )
    assert weights.modules or weights.replacements, "an adapter that changes nothing"
    for path, module in weights.modules.items():
        base = _BASE.by_path[path]
        assert module.shrink.shape[1] == base.d_in and module.expand.shape[1] == base.d_out
        assert len(module.shrink) == len(module.expand) <= _POLICY.max_rank
    tensors = [t for m in weights.modules.values() for t in (m.shrink, m.expand, m.shrink_bias, m.magnitude)]
    for tensor in (*tensors, *weights.replacements.values()):
        assert tensor is None or tensor.numel() == 0 or float(tensor.abs().max()) <= 1.01 * MAX_MAGNITUDE


def _check_refusal(error: FusionServeError) -> None:
    assert re.fullmatch(r"[A-Z][A-Z0-9_]{1,62}", error.reason), error.reason
    assert "\n" not in error.message and "\0" not in error.message, error.message
    status = to_status(error, "request")
    assert status.ByteSize() < MAX_STATUS_BYTES
    assert UNSAFE.search(status.message) is None, status.message


def _check_as_safetensors_does(directory: MemoryDirectory, name: str, data: bytes) -> None:
    """What our reader takes, the format's own reader takes, and sees the same tensors in it."""
    try:
        with directory.open_file(name, missing_reason="MISSING") as opened:
            ours = SafetensorsFile(opened).header.tensors
    except FusionServeError:
        return
    theirs = dict(safetensors.deserialize(data))
    assert ours.keys() == theirs.keys()
    for key, spec in ours.items():
        assert list(spec.shape) == theirs[key]["shape"]
        assert spec.end - spec.start == len(theirs[key]["data"])
