"""Adapters in memory, with random weights for a two-module base, made without files."""

from __future__ import annotations

from itertools import count
from types import MappingProxyType

import torch
from torch import Tensor

from fusionserve.adapters.adapter import Adapter, AdapterContent
from fusionserve.adapters.base_modules import BaseModule, BaseModules, ModuleKind
from fusionserve.adapters.lora_weights import LoRAWeights, ModuleLoRA

D_IN, D_OUT, VOCAB = 6, 5, 11
FIRST, SECOND, EMBEDDING = "layers.0.proj", "layers.1.proj", "embed_tokens"

_uids = count(1)


def make_modules(d_in: int = D_IN, d_out: int = D_OUT) -> BaseModules:
    """Two linear modules and an embedding."""
    modules = [
        BaseModule(path=EMBEDDING, kind=ModuleKind.EMBEDDING, d_in=VOCAB, d_out=D_IN, has_bias=False),
        *(
            BaseModule(path=path, kind=ModuleKind.LINEAR, d_in=d_in, d_out=d_out, has_bias=True)
            for path in (FIRST, SECOND)
        ),
    ]
    return BaseModules(
        model_name="loose",
        checkpoint_names=(),
        vocab_size=VOCAB,
        hidden_size=D_IN,
        num_layers=2,
        is_tied=False,
        by_path=MappingProxyType({module.path: module for module in modules}),
    )


def make_lora(
    rank: int, *, seed: int, d_in: int = D_IN, d_out: int = D_OUT, bias: bool = False
) -> ModuleLoRA:
    """Random A and B; with `bias` the last row has a constant input."""
    generator = torch.Generator().manual_seed(seed)
    return ModuleLoRA(
        shrink=torch.randn(rank, d_in, generator=generator),
        expand=torch.randn(rank, d_out, generator=generator),
        shrink_bias=torch.randn(rank, generator=generator) if bias else None,
    )


def make_content(
    modules: dict[str, ModuleLoRA] | None = None,
    *,
    replacements: dict[str, Tensor] | None = None,
    column_scales: dict[str, Tensor] | None = None,
    digest: str = "0" * 64,
) -> AdapterContent:
    """What a load would give."""
    weights = LoRAWeights(digest=digest, modules=modules or {}, replacements=replacements or {})
    return AdapterContent(weights, column_scales or {})


def make_adapter(content: AdapterContent, *, name: str = "") -> Adapter:
    """A version with a uid of its own."""
    uid = next(_uids)
    return Adapter(uid, name or f"adapter-{uid}", 1, content, 0.0)


def make_ranked(rank: int, *, name: str = "") -> Adapter:
    """An adapter of `rank` rows in the first module; 0 rows is one of replacements only."""
    modules = {FIRST: make_lora(rank, seed=rank)} if rank else {}
    return make_adapter(
        make_content(modules, replacements={} if rank else {EMBEDDING: torch.zeros(1)}), name=name
    )
