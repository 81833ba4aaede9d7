"""What each tensor of a LoRA weights file is for, decided from the header alone.

The tensors are trusted for which modules are adapted, the base model for which modules exist and how large
they are, the configuration for rank and scaling. Anything that does not fit all three is refused before data
is read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import torch

from fusionserve.adapters.artifact_errors import bad_tensor, quoted, unsupported
from fusionserve.adapters.base_modules import BaseModule, BaseModules, ModuleKind
from fusionserve.adapters.lora_config import LoRAConfig
from fusionserve.adapters.safetensors_file import TensorSpec, WeightsHeader
from fusionserve.errors import ArtifactError

_PREFIX = "base_model.model."
_KEPT_PLANS = 4  # fine-tunes of one base by one script have the same, and making it is a quarter of a load


class TensorRole(StrEnum):
    """The part a tensor plays in its module."""

    SHRINK = "A"
    EXPAND = "B"
    BIAS = "the bias of B"
    MAGNITUDE = "the DoRA magnitude"
    BASE_COPY = "a copy of the base weight"  # PEFT adds it when an embedding or head is adapted or replaced
    REPLACEMENT = "a replacement of the base weight"
    BIAS_COPY = "a copy of the base bias"
    BIAS_REPLACEMENT = "a replacement of the base bias"


# The ends of tensor names. ".weight" comes last: others end in it too.
_SHARED_SUFFIXES = (
    (".lora_magnitude_vector", TensorRole.MAGNITUDE),
    (".lora_magnitude_vector.weight", TensorRole.MAGNITUDE),
    (".base_layer.weight", TensorRole.BASE_COPY),
    (".original_module.weight", TensorRole.BASE_COPY),
    (".modules_to_save.weight", TensorRole.REPLACEMENT),
    (".weight", TensorRole.REPLACEMENT),
)
_LINEAR_SUFFIXES = (
    (".lora_A.weight", TensorRole.SHRINK),
    (".lora_B.weight", TensorRole.EXPAND),
    (".lora_B.bias", TensorRole.BIAS),
    *_SHARED_SUFFIXES,
)
_EMBEDDING_SUFFIXES = (
    (".lora_embedding_A", TensorRole.SHRINK),
    (".lora_embedding_B", TensorRole.EXPAND),
    *_SHARED_SUFFIXES,
)
_HEAD_BIAS_SUFFIXES = (
    (".base_layer.bias", TensorRole.BIAS_COPY),
    (".original_module.bias", TensorRole.BIAS_COPY),
    (".modules_to_save.bias", TensorRole.BIAS_REPLACEMENT),
    (".bias", TensorRole.BIAS_REPLACEMENT),
)
_SUFFIXES = {
    ModuleKind.LINEAR: _LINEAR_SUFFIXES,
    ModuleKind.CONV1D: _LINEAR_SUFFIXES,
    ModuleKind.EMBEDDING: _EMBEDDING_SUFFIXES,
    ModuleKind.LM_HEAD: (*_LINEAR_SUFFIXES, *_HEAD_BIAS_SUFFIXES),
}
_ALL_SUFFIXES = tuple(dict.fromkeys(pair for suffixes in _SUFFIXES.values() for pair in suffixes))
_WHOLE_WEIGHTS = (TensorRole.BASE_COPY, TensorRole.REPLACEMENT)
_WHOLE_BIASES = (TensorRole.BIAS_COPY, TensorRole.BIAS_REPLACEMENT)
_WHOLE = (*_WHOLE_WEIGHTS, *_WHOLE_BIASES)
_COPIES = {
    TensorRole.REPLACEMENT: TensorRole.BASE_COPY,
    TensorRole.BIAS_REPLACEMENT: TensorRole.BIAS_COPY,
}

_Parts = dict[TensorRole, TensorSpec]
_Place = tuple[str, TensorRole]  # path of the module and role in it


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePlan:
    """A module with low-rank tensors: `parts` are SHRINK and EXPAND, and BIAS or MAGNITUDE if there."""

    module: BaseModule
    rank: int
    scaling: float
    parts: Mapping[TensorRole, TensorSpec]

    @property
    def num_rows(self) -> int:
        """Rank rows: a bias of B is one more."""
        return self.rank + (TensorRole.BIAS in self.parts)

    def count_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the module's tensors as they are served."""
        values = self.num_rows * (self.module.d_in + self.module.d_out)
        bias = self.num_rows * dtype.itemsize if TensorRole.BIAS in self.parts else 0
        magnitude = self.module.d_out * 4 if TensorRole.MAGNITUDE in self.parts else 0
        return values * dtype.itemsize + bias + magnitude


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoRAPlan:
    """Every tensor of the file in its place: a part of a module, or a whole weight or bias.

    Copies of the base's, which it must equal, are in `places` alone. So is the second of two names of a replacement,
    which PEFT's `save_embedding_layers` writes; both must be equal.
    """

    modules: Mapping[str, ModulePlan]  # by module path
    replacements: Mapping[str, TensorSpec]  # by module path
    replaced_biases: Mapping[str, TensorSpec]  # by module path; only where the weight is replaced, too
    places: Mapping[str, _Place]  # by tensor name

    @property
    def max_rows(self) -> int:
        """The most rank rows in one module."""
        return max((module.num_rows for module in self.modules.values()), default=0)

    def count_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the adapter in memory once it is loaded."""
        whole = sum(
            math.prod(spec.shape) for spec in (*self.replacements.values(), *self.replaced_biases.values())
        )
        return whole * dtype.itemsize + sum(module.count_bytes(dtype) for module in self.modules.values())


@lru_cache(_KEPT_PLANS)
def plan_lora(header: WeightsHeader, config: LoRAConfig, base: BaseModules) -> LoRAPlan:
    """Finds the place of every tensor and checks names, pairs, ranks and shapes.

    Raises ArtifactError: ADAPTER_UNSUPPORTED, NO_EFFECTIVE_MODULES, UNEXPECTED_TENSOR, PAIR_MISSING,
    TENSOR_MISSING, RANK_MISMATCH, SHAPE_MISMATCH.
    """
    declared = _find_modules_to_save(config, base)
    places = _find_places(header.tensors.values(), base, replaceable=_with_tied(declared, config, base))
    replacements = _specs_by_path(header, places, TensorRole.REPLACEMENT)
    _check_declared(declared, replacements)
    low_rank = _sort_by_module(header, places)
    _check_adapted_once(low_rank, replacements)
    _check_tied({*low_rank, *replacements}, config, base)
    modules = _plan_modules(low_rank, config, base)
    if not modules and not replacements:
        raise _no_effect("the adapter changes no module of the base model")
    biases = _specs_by_path(header, places, TensorRole.BIAS_REPLACEMENT)
    return LoRAPlan(modules=modules, replacements=replacements, replaced_biases=biases, places=places)


def _find_modules_to_save(config: LoRAConfig, base: BaseModules) -> dict[str, str]:
    """The names in modules_to_save by the path each stands for; PEFT compares the end of the path."""
    found: dict[str, str] = {}
    for name in config.modules_to_save:
        paths = [path for path in base.vocabulary_paths if path.endswith(name)]
        if not paths:
            raise unsupported(f"modules_to_save {quoted(name)}; only the LM head and the input embedding are")
        found |= dict.fromkeys(paths, name)
    return found


def _with_tied(declared: Mapping[str, str], config: LoRAConfig, base: BaseModules) -> set[str]:
    """With ensure_weight_tying PEFT saves embedding and head though only one of them is named."""
    if declared and config.ensure_weight_tying and base.is_tied:
        return set(base.vocabulary_paths)
    return set(declared)


def _find_places(
    tensors: Iterable[TensorSpec], base: BaseModules, *, replaceable: Collection[str]
) -> dict[str, _Place]:
    places: dict[str, _Place] = {}
    strangers: list[TensorSpec] = []
    for spec in tensors:
        found = _find_place(spec.name, base)
        if found is None:
            strangers.append(spec)
            continue
        module, role = found
        _check_role(module, role, spec)
        _check_whole(module, role, spec)
        # One that modules_to_save does not name is what PEFT adds after a resize: it must equal the base.
        role = role if module.path in replaceable else _COPIES.get(role, role)
        places[spec.name] = (module.path, role)
    if strangers and not places:
        raise _no_effect("no tensor of the adapter belongs to a module that this base model can adapt")
    if strangers:
        problem = "it does not belong to a module that this base model can adapt"
        raise bad_tensor("UNEXPECTED_TENSOR", strangers[0].name, problem)
    return places


def _find_place(name: str, base: BaseModules) -> tuple[BaseModule, TensorRole] | None:
    if not name.startswith(_PREFIX):
        return None
    for suffix, role in _ALL_SUFFIXES:
        module = base.by_path.get(name[len(_PREFIX) : -len(suffix)]) if name.endswith(suffix) else None
        if module is not None and (suffix, role) in _SUFFIXES[module.kind]:
            return module, role
    return None


def _check_role(module: BaseModule, role: TensorRole, spec: TensorSpec) -> None:
    if role in _WHOLE_WEIGHTS and not module.is_vocabulary:
        raise unsupported(f"tensor {quoted(spec.name)} replaces a whole weight inside the layers")
    if role in _WHOLE_BIASES and not module.has_bias:
        raise bad_tensor("UNEXPECTED_TENSOR", spec.name, "the base model's module has no bias")
    if role is TensorRole.MAGNITUDE and module.kind is ModuleKind.EMBEDDING:
        raise unsupported("DoRA on the input embedding")


def _check_whole(module: BaseModule, role: TensorRole, spec: TensorSpec) -> None:
    if role not in _WHOLE:
        return
    shape = (module.d_out,) if role in _WHOLE_BIASES else module.weight_shape
    if spec.shape == shape:
        return
    if role in _WHOLE_WEIGHTS and len(spec.shape) == 2 and spec.shape[1] == module.weight_shape[1]:
        raise unsupported(
            f"a resized vocabulary of {spec.shape[0]} tokens; the base model's has {module.weight_shape[0]}"
        )
    raise _wrong_shape(spec, shape)


def _specs_by_path(
    header: WeightsHeader, places: Mapping[str, _Place], wanted: TensorRole
) -> dict[str, TensorSpec]:
    return {path: header.tensors[name] for name, (path, role) in places.items() if role is wanted}


def _sort_by_module(header: WeightsHeader, places: Mapping[str, _Place]) -> dict[str, _Parts]:
    """The low-rank tensors of each module."""
    by_path: dict[str, _Parts] = {}
    for name, (path, role) in places.items():
        if role in _WHOLE:
            continue
        parts = by_path.setdefault(path, {})
        if role in parts:
            raise bad_tensor("UNEXPECTED_TENSOR", name, f"its module already has {role}")
        parts[role] = header.tensors[name]
    return by_path


def _check_declared(declared: Mapping[str, str], replacements: Mapping[str, TensorSpec]) -> None:
    for path, name in declared.items():
        if path not in replacements:
            raise ArtifactError(
                f"modules_to_save names {quoted(name)}, but the weights file does not have it",
                reason="TENSOR_MISSING",
            )


def _check_adapted_once(low_rank: Mapping[str, _Parts], replacements: Mapping[str, TensorSpec]) -> None:
    for path in low_rank.keys() & replacements.keys():
        raise unsupported(f"{quoted(path)} is both replaced and adapted")


def _check_tied(changed: Collection[str], config: LoRAConfig, base: BaseModules) -> None:
    """With ensure_weight_tying a tied embedding and head are changed alike, so PEFT writes both."""
    if not (config.ensure_weight_tying and base.is_tied):
        return
    missing = [path for path in base.vocabulary_paths if path not in changed]
    if missing and len(missing) < len(base.vocabulary_paths):
        raise ArtifactError(
            f"ensure_weight_tying changes {quoted(missing[0])} as well, but the weights file does not have it",
            reason="TENSOR_MISSING",
        )


def _plan_modules(
    parts: Mapping[str, _Parts], config: LoRAConfig, base: BaseModules
) -> dict[str, ModulePlan]:
    ranks, scalings = _find_ranks(parts, config, base), config.scalings(parts)
    plans: dict[str, ModulePlan] = {}
    for path, roles in parts.items():
        module = base.by_path[path]
        _check_complete(path, roles, config)
        _check_shapes(module, roles, ranks[path])
        plans[path] = ModulePlan(module=module, rank=ranks[path], scaling=scalings[path], parts=roles)
    return plans


def _find_ranks(parts: Collection[str], config: LoRAConfig, base: BaseModules) -> dict[str, int]:
    """With ensure_weight_tying PEFT gives a tied head the embedding's own tensors, and so their rank.

    Its scaling stays that of the rank which the configuration gives it.
    """
    ranks, embedding, head = config.ranks(parts), base.embedding, base.lm_head
    if not (config.ensure_weight_tying and base.is_tied) or embedding is None or head is None:
        return ranks
    if embedding.path in ranks and head.path in ranks:
        ranks[head.path] = ranks[embedding.path]
    return ranks


def _check_complete(path: str, roles: _Parts, config: LoRAConfig) -> None:
    """The module has A, B and exactly what use_dora and lora_bias promise; PEFT would invent what lacks."""
    wanted = {TensorRole.SHRINK, TensorRole.EXPAND}
    if config.use_dora:
        wanted.add(TensorRole.MAGNITUDE)
    if config.lora_bias:
        wanted.add(TensorRole.BIAS)
    for role in sorted(wanted - roles.keys()):
        raise ArtifactError(
            f"module {quoted(path)} has no {role}", reason="PAIR_MISSING", metadata={"module": path}
        )
    for role in sorted(roles.keys() - wanted):
        problem = f"the configuration says nothing of {role}"
        raise bad_tensor("UNEXPECTED_TENSOR", roles[role].name, problem)


def _check_shapes(module: BaseModule, roles: _Parts, rank: int) -> None:
    shrink, expand = roles[TensorRole.SHRINK], roles[TensorRole.EXPAND]
    found = shrink.shape[0] if shrink.shape else 0
    if found != rank and (shrink.shape, expand.shape) == ((found, module.d_in), (module.d_out, found)):
        problem = f"its rank is {found}, the configuration's is {rank}"
        raise bad_tensor("RANK_MISMATCH", shrink.name, problem)
    wanted = {
        TensorRole.SHRINK: (rank, module.d_in),
        TensorRole.EXPAND: (module.d_out, rank),
        TensorRole.BIAS: (module.d_out,),
        TensorRole.MAGNITUDE: (module.d_out,),
    }
    for role, spec in roles.items():
        if spec.shape != wanted[role]:
            raise _wrong_shape(spec, wanted[role])


def _wrong_shape(spec: TensorSpec, wanted: tuple[int, ...]) -> ArtifactError:
    return bad_tensor("SHAPE_MISMATCH", spec.name, f"its shape is {list(spec.shape)}, not {list(wanted)}")


def _no_effect(problem: str) -> ArtifactError:
    return ArtifactError(problem, reason="NO_EFFECTIVE_MODULES")
