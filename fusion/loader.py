"""From a fusion's directory and its members to rank rows that may be served, or to the reason why not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fusionserve.adapters.artifact_directory import ArtifactDirectory
from fusionserve.adapters.artifact_errors import bad_tensor, quoted
from fusionserve.adapters.base_modules import BaseModules, ModuleKind
from fusionserve.adapters.lora_weights import LoRAWeights
from fusionserve.adapters.pinned_memory import pinned_bytes
from fusionserve.adapters.safetensors_file import SafetensorsFile, read_ahead
from fusionserve.artifact_folders import FUSION_CONFIG
from fusionserve.errors import ArtifactError, CapacityError, UnavailableError
from fusionserve.fusion.artifact import WEIGHTS_FILE
from fusionserve.fusion.config import MAX_CONFIG_BYTES, FusionConfig, parse_fusion_config
from fusionserve.fusion.folded import FoldedFusion, count_bytes, fold_fusion, plan_rows
from fusionserve.fusion.params import FusionParams, copy_tensors, make_params, tensor_shapes
from fusionserve.kernels.measured_copy import largest_magnitude

MAX_MAGNITUDE = 1e6  # of a trained value, as for adapters


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionPolicy:
    """What the server asks of every fusion it loads."""

    dtype: torch.dtype  # the one the adapter pool computes in
    budget_bytes: int
    max_rows: int  # rank rows in the pool
    allow_base_mismatch: bool = False
    pins_rows: bool = False  # for a pool on a GPU


@dataclass(frozen=True, slots=True, eq=False)
class ReadFusion:
    """A fusion as its directory has it: checked against the base, not yet against its members."""

    config: FusionConfig
    params: FusionParams
    digest: str  # sha256 (hex) of the weights file


def read_fusion(directory: ArtifactDirectory, base: BaseModules, policy: FusionPolicy) -> ReadFusion:
    """Reads both files of one open directory, so that a replacement under way never mixes two fusions.

    Raises ArtifactError with the reason: WRONG_BASE_MODEL, UNKNOWN_MODULE, and those of `read_fusion_config` and
    `read_fusion_params`.
    """
    config = read_fusion_config(directory)
    if not policy.allow_base_mismatch:
        check_base(config, base)
    config = in_call_order(config, base)
    return ReadFusion(config, *read_fusion_params(directory, config, base))


def fold_over(
    fusion: ReadFusion, members: Sequence[LoRAWeights], base: BaseModules, policy: FusionPolicy
) -> FoldedFusion:
    """Checks the members, in the fusion's order, and the size, and folds the fusion over them.

    Raises ArtifactError: MEMBER_DIGEST_MISMATCH, MEMBER_UNSUPPORTED, UNKNOWN_MODULE, NOT_FINITE; CapacityError
    (FUSION_TOO_BIG) if it fits neither budget nor pool.
    """
    check_members(fusion.config, members, base)
    num_rows = plan_rows(fusion.config, fusion.params, members).num_rows
    num_bytes = count_bytes(fusion.config, fusion.params, members, policy.dtype)
    _check_size(num_rows, pinned_bytes(num_bytes) if policy.pins_rows else num_bytes, policy)
    folded = fold_fusion(fusion.config, fusion.digest, fusion.params, members, policy.dtype)
    if not all(largest_magnitude(rows) < math.inf for rows in folded.own_rows()):
        raise ArtifactError(
            "folded over its members, the fusion has numbers beyond its type", reason="NOT_FINITE"
        )
    return folded.pinned() if policy.pins_rows else folded


def read_fusion_config(directory: ArtifactDirectory) -> FusionConfig:
    """Reads and checks the directory's configuration, which names the members to load first.

    Raises ArtifactError: CONFIG_MISSING, CONFIG_MALFORMED, FUSION_VERSION_UNSUPPORTED, and what opening a file raises.
    """
    with directory.open_file(FUSION_CONFIG, missing_reason="CONFIG_MISSING") as file:
        try:
            data = file.read(MAX_CONFIG_BYTES + 1)
        except OSError:
            raise UnavailableError(
                "the configuration could not be read from storage", reason="STORAGE_UNAVAILABLE"
            ) from None
    return parse_fusion_config(data or b"")


def check_base(config: FusionConfig, base: BaseModules) -> None:
    """Raises ArtifactError (WRONG_BASE_MODEL) if the fusion was trained on another base model."""
    if config.base_fingerprint != base.fingerprint:
        raise ArtifactError(
            f"the fusion was trained on {quoted(config.base_model)}, whose weights are not those served here",
            reason="WRONG_BASE_MODEL",
            metadata={"trained_on": quoted(config.base_model)[1:-1]},
        )


def in_call_order(config: FusionConfig, base: BaseModules) -> FusionConfig:
    """The configuration with its modules in the order in which the base calls them.

    Raises ArtifactError (UNKNOWN_MODULE) for a module that the base does not have or that no fusion can act on.
    """
    for path in config.modules:
        module = base.by_path.get(path)
        if module is None:
            raise _bad_module(path, "the base model has no such module to adapt")
        if module.kind is ModuleKind.EMBEDDING:
            raise _bad_module(path, "a fusion cannot weigh changes of the input embedding")
    wanted = set(config.modules)
    return replace(config, modules=tuple(path for path in base.by_path if path in wanted))


def check_members(config: FusionConfig, members: Sequence[LoRAWeights], base: BaseModules) -> None:
    """Raises ArtifactError unless `members`, in the fusion's order, are those it was trained with and can be weighed.

    Reasons: MEMBER_DIGEST_MISMATCH, MEMBER_UNSUPPORTED, UNKNOWN_MODULE.
    """
    embedding = base.embedding
    for member, weights in zip(config.members, members, strict=True):
        if weights.digest != member.digest:
            raise _bad_member(
                member.name,
                "is not the one the fusion was trained with: its digest differs",
                "MEMBER_DIGEST_MISMATCH",
            )
        if member.scalings_digest not in (None, weights.scalings_digest):
            raise _bad_member(
                member.name,
                "is scaled otherwise than when the fusion was trained: lora_alpha, alpha_pattern or use_rslora differs",
                "MEMBER_DIGEST_MISMATCH",
            )
        if weights.has_magnitudes:
            raise _bad_member(member.name, "is a DoRA, whose change is not of low rank")
        if weights.replacements:
            raise _bad_member(member.name, "replaces whole modules, which cannot be weighed")
        if embedding is not None and embedding.path in weights.modules:
            raise _bad_member(member.name, "changes the input embedding, which cannot be weighed")
    for path in config.modules:
        if not any(path in weights.modules for weights in members):
            raise _bad_module(path, "no member adapts it")


def read_fusion_params(
    directory: ArtifactDirectory, config: FusionConfig, base: BaseModules
) -> tuple[FusionParams, str]:
    """Reads the trained weights of a fusion whose modules are in call order, and the sha256 (hex) of their file.

    Names, shapes and sizes are checked before data is read. Raises ArtifactError: WEIGHTS_MISSING,
    UNEXPECTED_TENSOR, TENSOR_MISSING, SHAPE_MISMATCH, NOT_FINITE, and what reading a safetensors file raises.
    """
    with directory.open_file(WEIGHTS_FILE, missing_reason="WEIGHTS_MISSING") as opened:
        read_ahead(opened)
        file = SafetensorsFile(opened)
        _check_tensors(file, tensor_shapes(config, base))
        tensors = {}
        for spec, tensor in file.read_tensors():
            if not largest_magnitude(tensor) <= MAX_MAGNITUDE:  # NaN fails this too
                problem = f"it has values that are not finite or over {MAX_MAGNITUDE:g}"
                raise bad_tensor("NOT_FINITE", spec.name, problem)
            tensors[spec.name] = tensor
        digest = file.digest()
    params = make_params(config, base)
    copy_tensors(params, tensors)
    return params, digest


def _check_size(num_rows: int, num_bytes: int, policy: FusionPolicy) -> None:
    if num_bytes > policy.budget_bytes:
        raise CapacityError(
            f"the fusion takes {num_bytes} bytes, the host has {policy.budget_bytes} for fusions",
            reason="FUSION_TOO_BIG",
        )
    if num_rows > policy.max_rows:
        raise CapacityError(
            f"the fusion takes {num_rows} rank rows, the pool has {policy.max_rows}",
            reason="FUSION_TOO_BIG",
        )


def _check_tensors(file: SafetensorsFile, wanted: Mapping[str, tuple[int, ...]]) -> None:
    for name, spec in file.header.tensors.items():
        if name not in wanted:
            raise bad_tensor("UNEXPECTED_TENSOR", name, "the fusion's configuration has no place for it")
        if spec.shape != wanted[name]:
            problem = f"its shape is {list(spec.shape)}, not {list(wanted[name])}"
            raise bad_tensor("SHAPE_MISMATCH", name, problem)
    for name in wanted:
        if name not in file.header.tensors:
            raise bad_tensor("TENSOR_MISSING", name, "the weights file does not have it")


def _bad_member(name: str, problem: str, reason: str = "MEMBER_UNSUPPORTED") -> ArtifactError:
    return ArtifactError(f"member {name} {problem}", reason=reason, metadata={"member": name})


def _bad_module(path: str, problem: str) -> ArtifactError:
    return ArtifactError(
        f"module {quoted(path)}: {problem}", reason="UNKNOWN_MODULE", metadata={"module": quoted(path)[1:-1]}
    )
