"""Loss on held-out rows: the mean over all learned tokens, whatever the batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusionserve.training.rows import Row, collate

Observe = Callable[[Tensor], None]  # called after each batch with its mask of tokens, [rows, length]


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """Mean cross-entropy in nats, and of how many tokens."""

    loss: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate_loss(
    model: nn.Module, rows: Sequence[Row], batch_rows: int, observe: Observe | None = None
) -> HeldOutLoss:
    """Evaluates `model` as it is; it is left in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    total, num_tokens = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(rows), batch_rows):
            batch = {
                name: tensor.to(device) for name, tensor in collate(rows[start : start + batch_rows]).items()
            }
            is_token = batch.pop("is_token")
            loss, count = _summed_loss(model, batch)
            total, num_tokens = total + loss, num_tokens + count
            if observe is not None:
                observe(is_token)
    return HeldOutLoss(total / max(1, num_tokens), num_tokens)


def _summed_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[float, int]:
    labels = batch["labels"][:, 1:].flatten()
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels, reduction="sum")
    return float(losses), int((labels != -100).sum())
