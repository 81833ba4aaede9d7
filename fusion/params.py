"""The trained weights of a fusion: an attention at some modules, a V at others, and their names in the file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fusionserve.adapters.base_modules import BaseModules
from fusionserve.fusion.attention import FusionAttention, FusionValue
from fusionserve.fusion.config import FusionConfig, Scope, ValueKind

_LAYER = re.compile(r".*?\.\d+(?=\.)")  # "model.layers.3" of "model.layers.3.self_attn.q_proj"


@dataclass(frozen=True, slots=True)
class FusionParams:
    """Trained modules by module path. All of a module's tensors are named `<path>.<name in the module>`."""

    attentions: Mapping[str, FusionAttention]
    values: Mapping[str, FusionValue]

    def named_tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter under its name in the file: `<path>.query.weight`, `<path>.value.up.weight`."""
        for path, attention in self.attentions.items():
            yield from ((f"{path}.{name}", tensor) for name, tensor in attention.named_parameters())
        for path, value in self.values.items():
            yield from ((f"{path}.value.{name}", tensor) for name, tensor in value.named_parameters())

    def modules(self) -> Iterator[nn.Module]:
        """Every trained module."""
        yield from self.attentions.values()
        yield from self.values.values()


def make_params(config: FusionConfig, base: BaseModules) -> FusionParams:
    """Untrained parameters for a fusion of this configuration; its modules must be modules of the base."""
    shapes = {path: (base.by_path[path].d_in, base.by_path[path].d_out) for path in config.modules}
    attended = attention_paths(config.scope, config.modules)
    has_value = config.value is not ValueKind.NONE
    return FusionParams(
        attentions={path: FusionAttention(config, *shapes[path]) for path in attended},
        values={path: FusionValue(config, shapes[path][1]) for path in config.modules if has_value},
    )


def tensor_shapes(config: FusionConfig, base: BaseModules) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the weights file must have, without making any."""
    d_key, num_members, rank = config.d_key, len(config.members), config.value_rank
    shapes: dict[str, tuple[int, ...]] = {}
    for path in attention_paths(config.scope, config.modules):
        module = base.by_path[path]
        shapes[f"{path}.query.weight"] = (d_key, module.d_in)
        shapes[f"{path}.query.bias"] = (d_key,)
        shapes[f"{path}.key.weight"] = (d_key, module.d_out)
        if config.member_keys:
            shapes[f"{path}.member_keys"] = (num_members, d_key)
    for path in config.modules:
        d_out = base.by_path[path].d_out
        if config.value is ValueKind.DIAGONAL:
            shapes[f"{path}.value.weight"] = (d_out,)
        elif config.value is ValueKind.LOW_RANK:
            shapes[f"{path}.value.down.weight"] = (rank, d_out)
            shapes[f"{path}.value.up.weight"] = (d_out, rank)
    return shapes


def attention_paths(scope: Scope, modules: Sequence[str]) -> tuple[str, ...]:
    """The modules with an attention: all of them, or the first of each layer. `modules` are in the order of calls."""
    if scope is Scope.MODULE:
        return tuple(modules)
    first: dict[str, str] = {}
    for path in modules:
        first.setdefault(layer_of(path), path)
    return tuple(first.values())


def layer_of(path: str) -> str:
    """The path of the decoder layer that a module lies in; of a module outside the layers, its own path."""
    match = _LAYER.match(path)
    return match.group() if match else path


def copy_tensors(params: FusionParams, tensors: Mapping[str, Tensor]) -> None:
    """Sets every parameter from `tensors`, which has all of them under their names in the file."""
    for name, parameter in params.named_tensors():
        parameter.data.copy_(tensors[name])
