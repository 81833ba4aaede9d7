"""The Muon optimizer in float32, for processors on which bfloat16 products are slow."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import Optimizer

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(Optimizer):
    """Momentum whose update is made orthogonal, for weight matrices; one rate fits AdamW's scale."""

    def __init__(
        self,
        weights: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        iterations: int = 5,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations}
        super().__init__(weights, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient; a closure is not supported."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)

    def _update(self, weight: nn.Parameter, gradient: torch.Tensor, group: dict[str, float]) -> None:
        state = self.state[weight]
        if not state:
            state["average"] = torch.zeros_like(weight)
        state["average"].lerp_(gradient, 1 - group["momentum"])
        nesterov = gradient.lerp(state["average"], group["momentum"])
        update = orthogonalise(nesterov, int(group["iterations"]))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)


def orthogonalise(matrix: torch.Tensor, iterations: int) -> torch.Tensor:
    """Push all singular values of a matrix towards 1 by Newton-Schulz iterations."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x: torch.Tensor = matrix.T if tall else matrix
    x = x / (torch.linalg.matrix_norm(x) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
