"""DoRA (arXiv 2402.09353): the direction of W0 + s B A with a learned length per output.

    y = c * (W0 x + s B A x) + b0        c = m / |W0 + s B A|, the norm taken over the inputs of each output

c depends on weights only, so it is computed once, when the adapter loads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusionserve.adapters.lora_weights import LoRAWeights, ModuleLoRA


def column_scales(weights: LoRAWeights, base_weight: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """c for every module with a magnitude, [d_out] in float32; `base_weight(path)` gives W0 as [d_out, d_in]."""
    return {
        path: _column_scale(module, base_weight(path))
        for path, module in weights.modules.items()
        if module.magnitude is not None
    }


def _column_scale(module: ModuleLoRA, base_weight: Tensor) -> Tensor:
    """On the host, as the adapter is; computed where the base is."""
    assert module.magnitude is not None
    device = base_weight.device
    expand, shrink = module.expand.to(device).float(), module.shrink.to(device).float()
    lengths: Tensor = torch.linalg.vector_norm(torch.addmm(base_weight.float(), expand.T, shrink), dim=1)
    return module.magnitude / lengths.to(module.magnitude.device)
