"""Random fusions over random adapters for a small base, without files: every option, mixed ranks, missing modules."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from fusionserve.adapters.base_modules import BaseModule, BaseModules, ModuleKind
from fusionserve.adapters.lora_weights import LoRAWeights, ModuleLoRA
from fusionserve.fusion.config import FusionConfig, FusionMember, Scope, ValueKind
from fusionserve.fusion.params import FusionParams, make_params

Q_PROJ, DOWN_PROJ = "self_attn.q_proj", "mlp.down_proj"
HIDDEN, INNER = 7, 9
SHAPES = {Q_PROJ: (HIDDEN, HIDDEN), DOWN_PROJ: (INNER, HIDDEN)}


def make_base(num_layers: int = 2) -> BaseModules:
    """A base with a q_proj and a down_proj in each layer."""
    modules = [
        BaseModule(
            path=f"model.layers.{layer}.{name}",
            kind=ModuleKind.LINEAR,
            d_in=d_in,
            d_out=d_out,
            has_bias=False,
        )
        for layer in range(num_layers)
        for name, (d_in, d_out) in SHAPES.items()
    ]
    return BaseModules(
        model_name="tiny",
        checkpoint_names=(),
        vocab_size=11,
        hidden_size=HIDDEN,
        num_layers=num_layers,
        is_tied=False,
        by_path=MappingProxyType({module.path: module for module in modules}),
        fingerprint="f" * 64,
    )


def make_lora(module: BaseModule, rank: int, generator: torch.Generator, *, has_bias: bool) -> ModuleLoRA:
    """Random float64 rows; with a bias of B the last one is its row."""
    shrink = torch.randn(rank, module.d_in, generator=generator, dtype=torch.float64)
    expand = torch.randn(rank, module.d_out, generator=generator, dtype=torch.float64)
    bias = None
    if has_bias:
        shrink[-1] = 0
        bias = torch.zeros(rank, dtype=torch.float64)
        bias[-1] = 1
    return ModuleLoRA(shrink=shrink, expand=expand, shrink_bias=bias)


def make_member(base: BaseModules, seed: int, ranks: Sequence[int]) -> LoRAWeights:
    """An adapter of the given rank at each module of the base; rank 0 leaves the module out."""
    generator = torch.Generator().manual_seed(seed)
    loras = {
        path: make_lora(module, rank, generator, has_bias=seed % 3 == 2 and rank > 1)
        for (path, module), rank in zip(base.by_path.items(), ranks, strict=True)
        if rank
    }
    return LoRAWeights(digest=f"{seed:064x}", modules=loras, replacements={})


def make_config(base: BaseModules, members: Sequence[LoRAWeights], **changes: object) -> FusionConfig:
    """A fusion of `members` at every module that one of them adapts."""
    fields: dict[str, object] = {
        "name": "mix",
        "base_model": base.model_name,
        "base_fingerprint": base.fingerprint,
        "members": tuple(FusionMember(f"m{i}", member.digest) for i, member in enumerate(members)),
        "modules": tuple(path for path in base.by_path if any(path in m.modules for m in members)),
        "scope": Scope.LAYER,
        "d_key": 5,
        "value": ValueKind.NONE,
        **changes,
    }
    return FusionConfig(**fields)  # type: ignore[arg-type]


def make_trained(config: FusionConfig, base: BaseModules, seed: int, size: float = 0.3) -> FusionParams:
    """Parameters in float64 far from where training starts, so that every part counts."""
    params = make_params(config, base)
    generator = torch.Generator().manual_seed(seed)
    for module in params.modules():
        module.double()
    for _, parameter in params.named_tensors():
        parameter.data += torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * size
    return params


def random_tokens(num_tokens: int, width: int, seed: int) -> Tensor:
    """Inputs [num_tokens, width] in float64."""
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
