"""One training loop for everything that learns to predict the next token."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Warm-up, plateau and linear cool-down of the learning rate, over a fixed number of steps."""

    steps: int
    warmup_steps: int
    cooldown_share: float = 0.4

    def factor(self, step: int) -> float:
        """The multiple of the peak learning rate at a step, from 0 to 1."""
        remaining = (self.steps - step) / max(1.0, self.cooldown_share * self.steps)
        return min(1.0, (step + 1) / max(1, self.warmup_steps), remaining)


def next_token_loss(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of predicting tokens 1.. of each row of [batch, length] from those before."""
    logits = model(input_ids=input_ids[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), input_ids[:, 1:].flatten())


def mixed_precision_loss(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """`next_token_loss` with the matrix products in bfloat16, for processors that have instructions for it."""
    with torch.autocast("cpu", torch.bfloat16):
        return next_token_loss(model, input_ids)


LOSSES: dict[str, Loss] = {
    "float32": next_token_loss,
    "bfloat16": mixed_precision_loss,
}  # by type of the products


def train(
    model: nn.Module,
    optimizers: list[Optimizer],
    batches: Iterable[torch.Tensor],
    schedule: Schedule,
    loss_function: Loss = next_token_loss,
) -> float:
    """Train for `schedule.steps` batches and return the mean loss of the last tenth."""
    model.train()
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    losses: list[float] = []
    progress = tqdm(islice(batches, schedule.steps), total=schedule.steps, mininterval=10.0)
    for step, input_ids in enumerate(progress):
        _set_rates(optimizers, peaks, schedule.factor(step))
        losses.append(_step(model, optimizers, input_ids, loss_function))
        progress.set_postfix(loss=f"{_mean(losses[-50:]):.3f}", refresh=False)
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {step}")
    return _mean(losses[-max(1, schedule.steps // 10) :])


def _step(
    model: nn.Module, optimizers: list[Optimizer], input_ids: torch.Tensor, loss_function: Loss
) -> float:
    loss = loss_function(model, input_ids)
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(_trained(model), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def _set_rates(optimizers: list[Optimizer], peaks: list[list[float]], factor: float) -> None:
    for optimizer, rates in zip(optimizers, peaks, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor


def _trained(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
