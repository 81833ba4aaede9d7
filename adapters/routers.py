"""The linear modules of a mixture that choose experts or weigh them: they are never held in fewer bits.

A few numbers per token decide which experts it meets, so an error in them does not stay small; and their weights are
a thousandth of the experts' at most.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_COUNTS = ("num_experts", "total_experts")


def router_paths(model: nn.Module) -> set[str]:
    """Of the linear modules, in a module that holds experts, that have one output for each of them, or one in all.

    Routers that are no linear modules, or have a forward of their own, are not among what is quantized anyway.
    """
    return {
        f"{path}.{name}"
        for path, mixture in model.named_modules()
        for num_experts in _sizes(mixture)
        for name, module in mixture.named_modules()
        if isinstance(module, nn.Linear) and module.out_features in (1, num_experts)
    }


def has_experts(model: nn.Module) -> bool:
    """True for a mixture, whose routers choose which experts a token meets."""
    return any(_sizes(module) for module in model.modules())


def _sizes(mixture: nn.Module) -> list[int]:
    """Among how many experts a module's router chooses, for each kind; LongCat's total has some without weights."""
    experts: list[Any] = [child for child in mixture.children() if type(child).__name__.endswith("Experts")]
    return [getattr(child, name) for child in experts for name in _COUNTS if hasattr(child, name)]
