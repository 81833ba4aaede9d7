"""What surrounds the training of either stage: the work folder before it, the summary and the tidying behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from fusionserve.adapters.weight_bytes import count_parameters, weight_bytes
from fusionserve.artifact_folders import ADAPTER_CONFIG, FUSION_CONFIG
from fusionserve.errors import TrainingError
from fusionserve.training.adaptation_trainer import TrainedRun
from fusionserve.training.atomic_directory import atomic_directory
from fusionserve.training.checkpoints import prepare_work_dir, remove_work_dir
from fusionserve.training.data import TrainingData
from fusionserve.training.evaluation import Observe, evaluate_loss
from fusionserve.training.frozen_base import FrozenBase, check_dtype, check_packing
from fusionserve.training.peak_memory import PeakMemory
from fusionserve.training.run_identity import describe_run, identify_run
from fusionserve.training.training_summary import FusionStatistics, TrainingSummary, last_losses
from fusionserve.training_config import TrainingRun


class RunFrame:
    """Made once base and data are there and fit each other; `checkpoint` is where to go on from, if anywhere.

    `member_digests` are those of the adapters that a fusion weighs, of weights and scalings.
    """

    def __init__(
        self, run: TrainingRun, base: FrozenBase, data: TrainingData, member_digests: Sequence[str] = ()
    ) -> None:
        _check_out(run.out)
        if run.checkpoints.resolve().is_relative_to(run.out.resolve()):
            raise TrainingError(f"the checkpoints would lie in {run.out}, which is replaced as a whole")
        check_dtype(base)
        if run.optimization.patience is not None and not data.held_out:
            raise TrainingError("patience needs held-out examples: give some, or go without --patience")
        _check_length(base, data)
        if run.data.packing:
            check_packing(base)
        self._run = run
        self._base = base
        self._data = data
        self._memory = PeakMemory()
        self._base_bytes = weight_bytes(base.model)
        identity = identify_run(run, data.digest, base.modules.fingerprint, member_digests)
        self.checkpoint = prepare_work_dir(run.checkpoints, identity, resume=run.resume)

    def judge(self, model: nn.Module, observe: Observe | None = None) -> float | None:
        """The held-out loss; without held-out rows None, and `observe` sees a batch of training rows."""
        rows = self._run.optimization.batch_rows
        if self._data.held_out:
            return evaluate_loss(model, self._data.held_out, rows, observe).loss
        evaluate_loss(model, self._data.train[:rows], rows, observe)
        return None

    def summarize(
        self,
        kind: str,
        name: str,
        model: nn.Module,
        trained: TrainedRun,
        held_out_loss: float | None,
        fusion: FusionStatistics | None = None,
    ) -> TrainingSummary:
        """The summary of a model that has its best weights."""
        trainable, total = count_parameters(model)
        train_loss, before = last_losses(trained.history)
        return TrainingSummary(
            kind=kind,
            name=name,
            base_model=self._base.name,
            settings=describe_run(self._run),
            data=self._data.describe(),
            steps=trained.steps,
            best_step=trained.best_step,
            trainable_parameters=trainable,
            total_parameters=total,
            seconds=round(trained.seconds, 1),
            peak_memory_bytes=self._memory.resident_bytes,
            peak_device_bytes=self._memory.device_bytes,
            base_bytes=self._base_bytes,
            train_loss=train_loss,
            held_out_loss=held_out_loss,
            held_out_loss_before=before,
            history=trained.history,
            fusion=fusion,
        )

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """An empty directory that becomes the artifact at the end of the block, if there still is a place for one."""
        with atomic_directory(self._run.out) as staging:
            yield staging
            _check_out(self._run.out)

    def close(self) -> None:
        """Removes the checkpoints, now that the artifact is written, unless they are wanted."""
        if not self._run.keep_checkpoints:
            remove_work_dir(self._run.checkpoints)


def _check_length(base: FrozenBase, data: TrainingData) -> None:
    most = base.max_tokens
    longest = max((int(row.positions.max()) + 1 for row in (*data.train, *data.held_out)), default=0)
    if most is not None and longest > most:
        raise TrainingError(f"an example has {longest} tokens; {base.name} reads {most}: lower --max-tokens")


def _check_out(out: Path) -> None:
    """Only an artifact may be replaced: a mistyped path must not cost a folder of something else."""
    if not out.exists() or any((out / name).is_file() for name in (ADAPTER_CONFIG, FUSION_CONFIG)):
        return
    if not out.is_dir() or any(out.iterdir()):
        raise TrainingError(f"{out} is neither free nor an adapter or fusion to replace")
