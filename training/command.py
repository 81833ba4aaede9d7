"""What `fusionserve train` runs once its settings are checked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fusionserve.training.adapter_training import train_adapter
from fusionserve.training.fusion_training import train_fusion
from fusionserve.training.quiet_libraries import keep_libraries_quiet
from fusionserve.training_config import AdapterRun, FusionRun, TrainingRun


def run_adapter(run: AdapterRun) -> str:
    """Trains an adapter and returns the table to print."""
    with _for_people(run):
        return train_adapter(run).to_table()


def run_fusion(run: FusionRun) -> str:
    """Trains a fusion and returns the table to print."""
    with _for_people(run):
        return train_fusion(run).to_table()


@contextmanager
def _for_people(run: TrainingRun) -> Iterator[None]:
    """Leaves the terminal to our own bar, and tells who interrupts that nothing is lost."""
    keep_libraries_quiet()
    try:
        yield
    except KeyboardInterrupt:
        if run.checkpoints.is_dir():
            print(
                "\nstopped; the same command with --resume goes on from the last checkpoint", file=sys.stderr
            )
        raise
