"""The transformers Trainer, for few trained weights on a frozen base: what both stages run.

Its checkpoints hold the trained tensors alone, count only when complete, and let a killed run go on where it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from fusionserve.errors import TrainingError
from fusionserve.training.checkpoints import mark_complete, remove_older, seconds_until
from fusionserve.training.data import TrainingData
from fusionserve.training.evaluation import Observe, evaluate_loss
from fusionserve.training.progress_bar import ProgressBar
from fusionserve.training.rows import collate
from fusionserve.training_config import OptimizationConfig, TrainingRun

TRAINED_FILE = "trained.safetensors"

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a stage adds: a part of the loss, and what it wants to see and say at evaluations."""

    penalty: Callable[[Tensor], Tensor] | None = None  # of a batch's mask of tokens, after its forward pass
    observe: Observe | None = None
    metrics: Callable[[], Metrics] = field(default=dict)  # of what was observed since the last call


NO_HOOKS = Hooks()


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """What training came to; the model holds the best weights."""

    steps: int
    seconds: float  # of training, over all resumed parts
    best_step: int | None  # None without held-out rows
    history: tuple[Mapping[str, float], ...]


class AdaptationTrainer(Trainer):
    """Trains whatever requires a gradient in `model`."""

    def __init__(
        self, model: nn.Module, data: TrainingData, arguments: TrainingArguments, hooks: Hooks
    ) -> None:
        self._hooks = hooks
        self._trained = model
        self._held_out = data.held_out
        self._started_s = time.monotonic()
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collate,
            train_dataset=data.train,
            eval_dataset=data.held_out or None,
        )
        self.remove_callback(PrinterCallback)

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before a resumption included."""
        return time.monotonic() - self._started_s

    def restore_finished(self, checkpoint: Path) -> bool:
        """True if training had ended with `checkpoint`; then the best weights are back in the model."""
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step < self.args.max_steps and not _was_stopped(state):
            return False
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        if state.best_model_checkpoint is not None:
            self._load_best_model()
        return True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss on the learned tokens, and the stage's penalty."""
        is_token = inputs.pop("is_token")
        found: Any = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss, outputs = found
        if self._hooks.penalty is not None:
            penalty = self._hooks.penalty(is_token)
            if self.model_accepts_loss_kwargs:  # other losses the Trainer itself divides
                penalty = penalty / self.current_gradient_accumulation_steps
            loss = loss + penalty
        return (loss, outputs) if return_outputs else loss

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weights of linear modules alone: a diagonal V is neutral at ones, and a member's key is no matrix."""
        return [f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Linear)]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> Metrics:
        """The mean over all held-out tokens; the Trainer's own would weigh batches alike."""
        measured = evaluate_loss(
            self._trained, self._held_out, self.args.per_device_eval_batch_size, self._hooks.observe
        )
        metrics = {f"{metric_key_prefix}_loss": measured.loss}
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in self._hooks.metrics().items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        assert output_dir is not None, "checkpoints have a folder"
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        tensors = {
            name: parameter.detach().contiguous() for name, parameter in trained_parameters(self._trained)
        }
        save_file(tensors, Path(output_dir) / TRAINED_FILE)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        work_dir = Path(str(self.args.output_dir))
        mark_complete(work_dir / f"checkpoint-{self.state.global_step}", self.seconds)
        remove_older(work_dir, best=self._best_checkpoint())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        _load_trained(self._trained, Path(resume_from_checkpoint))
        self._started_s = time.monotonic() - seconds_until(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best = self._best_checkpoint()
        assert best is not None, "somebody has asked whether there is one"
        _load_trained(self._trained, best)

    def _best_checkpoint(self) -> Path | None:
        """Where it is now: the state has where it was written, and the folder may have moved."""
        written = self.state.best_model_checkpoint
        return None if written is None else Path(str(self.args.output_dir)) / Path(written).name


def run_training(
    model: nn.Module, data: TrainingData, run: TrainingRun, checkpoint: Path | None, hooks: Hooks = NO_HOOKS
) -> TrainedRun:
    """Trains to the end, from `checkpoint` on if there is one. Raises TrainingError if the loss is not finite."""
    arguments = training_arguments(run, len(data.train), bool(data.held_out))
    arguments.eval_on_start = bool(data.held_out) and checkpoint is None
    trainer = AdaptationTrainer(model, data, arguments, hooks)
    trainer.add_callback(_Watch())
    if run.show_progress:
        trainer.add_callback(ProgressBar())
    if run.optimization.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(run.optimization.patience))
    try:
        if checkpoint is None or not trainer.restore_finished(checkpoint):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        # Else the model would go on computing in bfloat16, and a base that is used again with it.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return TrainedRun(
        steps=trainer.state.global_step,
        seconds=trainer.seconds,
        best_step=trainer.state.best_global_step if data.held_out else None,
        history=tuple(trainer.state.log_history),
    )


def training_arguments(run: TrainingRun, num_rows: int, has_held_out: bool) -> TrainingArguments:
    """The Trainer's settings for a run over `num_rows` rows."""
    config = run.optimization
    steps = count_steps(config, num_rows)
    interval = min(steps, config.eval_steps or max(1, steps // 10))
    has_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(run.checkpoints),
        max_steps=steps,
        per_device_train_batch_size=config.batch_rows,
        per_device_eval_batch_size=config.batch_rows,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=_SCHEDULES[config.schedule],
        warmup_steps=round(config.warmup_share * steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        bf16=config.bf16,
        use_cpu=not has_gpu,
        dataloader_pin_memory=has_gpu,
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=max(1, min(10, steps // 50)),
        logging_nan_inf_filter=False,
        eval_strategy="steps" if has_held_out else "no",
        eval_steps=interval,
        save_steps=interval,
        load_best_model_at_end=has_held_out,
        metric_for_best_model="eval_loss" if has_held_out else None,
        greater_is_better=False if has_held_out else None,
        label_names=["labels"],
        remove_unused_columns=False,
        restore_callback_states_from_checkpoint=True,
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # with several the Trainer would split batches between copies
    return arguments


def count_steps(config: OptimizationConfig, num_rows: int) -> int:
    """Optimizer steps of a run; an epoch's last one may read fewer rows."""
    if config.steps is not None:
        return config.steps
    batches = math.ceil(num_rows / config.batch_rows)
    return max(1, round(config.epochs * math.ceil(batches / config.accumulation)))


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that require a gradient."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class _Watch(TrainerCallback):
    """Ends a run whose loss is lost."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        for name in ("loss", "eval_loss"):
            loss = (logs or {}).get(name, 0.0)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} at step {state.global_step}: lower the learning rate"
                )


def _was_stopped(state: TrainerState) -> bool:
    """True if the run was to go no further, as by its patience."""
    saved: Any = state.stateful_callbacks or {}  # as a file has them: by name, with their arguments
    return bool(saved.get("TrainerControl", {}).get("args", {}).get("should_training_stop"))


def _load_trained(model: nn.Module, checkpoint: Path) -> None:
    tensors = load_file(checkpoint / TRAINED_FILE)
    parameters = dict(trained_parameters(model))
    assert tensors.keys() == parameters.keys(), "a checkpoint of this run has its tensors"
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
