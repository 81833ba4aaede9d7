"""What a fusion is made from: its members' weights, read as the server reads them, and its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from fusionserve.adapters.base_modules import ModuleKind
from fusionserve.adapters.lora_weights import LoRAWeights
from fusionserve.errors import FusionServeError, TrainingError
from fusionserve.fusion.config import FusionConfig, FusionMember, Scope, ValueKind, parse_fusion_config
from fusionserve.fusion.loader import check_members
from fusionserve.limits import is_artifact_name
from fusionserve.training.adapter_reading import read_adapter
from fusionserve.training.frozen_base import FrozenBase
from fusionserve.training_config import FusionRun


def read_members(run: FusionRun, base: FrozenBase) -> list[LoRAWeights]:
    """The members in the run's order. Raises TrainingError that names the member and why it cannot be had."""
    members = []
    for name, path in run.members:
        try:
            members.append(read_adapter(path, base, allow_base_mismatch=run.allow_base_mismatch))
        except FusionServeError as error:
            raise TrainingError(f"member {name}: {error.message}") from error
    return members


def make_fusion_config(run: FusionRun, base: FrozenBase, members: Sequence[LoRAWeights]) -> FusionConfig:
    """The configuration of the fusion to train, with its modules in call order.

    Raises TrainingError for options that do not fit, ArtifactError for members that cannot be weighed.
    """
    _check_names(run)
    config = FusionConfig(
        name=run.name,
        base_model=base.name,
        base_fingerprint=base.modules.fingerprint,
        members=tuple(
            FusionMember(name, weights.digest, weights.scalings_digest)
            for (name, _), weights in zip(run.members, members, strict=True)
        ),
        modules=_choose_modules(run, base, members),
        scope=Scope(run.scope),
        d_key=run.d_key,
        member_keys=run.member_keys,
        value=ValueKind(run.value),
        value_rank=run.value_rank if run.value == ValueKind.LOW_RANK.value else 0,
        temperature=run.temperature,
        base_member=run.base_member,
    )
    check_members(config, members, base.modules)
    _check_readable(replace(config, training=dict(run.notes)))
    return config


def _check_readable(config: FusionConfig) -> None:
    """Raises TrainingError if the server would refuse the configuration, before hours are spent on it."""
    try:
        parse_fusion_config(config.to_json().encode())
    except (FusionServeError, TypeError, ValueError) as error:
        raise TrainingError(f"the server would refuse such a fusion: {error}") from error


def _check_names(run: FusionRun) -> None:
    names = [name for name, _ in run.members]
    if not names:
        raise TrainingError("a fusion needs members; name them with --member NAME=PATH")
    for name in (run.name, *names):
        if not is_artifact_name(name):
            raise TrainingError(
                f"{name!r} is not a name: 1 to 63 of a-z 0-9 . _ -, and neither base nor other"
            )
    if len(set(names)) != len(names):
        raise TrainingError("a member is named twice")


def _choose_modules(run: FusionRun, base: FrozenBase, members: Sequence[LoRAWeights]) -> tuple[str, ...]:
    """Paths that a member adapts and that the run names; a pattern is a last name or matches a whole path."""
    adapted = [
        path
        for path, module in base.modules.by_path.items()
        if module.kind is not ModuleKind.EMBEDDING and any(path in member.modules for member in members)
    ]
    for pattern in run.modules:
        if not any(_matches(path, pattern) for path in adapted):
            names = sorted({path.rpartition(".")[2] for path in adapted})
            raise TrainingError(f"no member adapts a module {pattern!r}; they adapt {', '.join(names)}")
    chosen = [
        path for path in adapted if not run.modules or any(_matches(path, pattern) for pattern in run.modules)
    ]
    if not chosen:
        raise TrainingError("no member adapts a module that a fusion can act on")
    return tuple(chosen)


def _matches(path: str, pattern: str) -> bool:
    return path.rpartition(".")[2] == pattern or fnmatchcase(path, pattern)
