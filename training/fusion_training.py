"""Stage 2, knowledge composition: base and adapters frozen, only the fusion's attention (and V) trains.

The modules that train are those that the server folds: fusion/attention.py in the place fusion/unfolded.py gives them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from transformers import set_seed

from fusionserve.adapters.artifact_directory import open_directory
from fusionserve.adapters.lora_weights import LoRAWeights
from fusionserve.fusion.artifact import save_fusion
from fusionserve.fusion.config import FusionConfig
from fusionserve.fusion.loader import in_call_order, read_fusion_config, read_fusion_params
from fusionserve.fusion.params import make_params
from fusionserve.fusion.unfolded import TokenWeighing, UnfoldedFusion
from fusionserve.training.adaptation_trainer import Hooks, run_training
from fusionserve.training.data import TrainingData, load_data
from fusionserve.training.frozen_base import FrozenBase, load_base
from fusionserve.training.fusion_members import make_fusion_config, read_members
from fusionserve.training.fusion_watch import FusionPenalty, FusionWatch
from fusionserve.training.run_frame import RunFrame
from fusionserve.training.training_summary import FusionStatistics, TrainingSummary, write_summary
from fusionserve.training_config import FusionRun


def train_fusion(
    run: FusionRun, *, base: FrozenBase | None = None, data: TrainingData | None = None
) -> TrainingSummary:
    """Trains a fusion and writes it to `run.out`, with the summary beside it.

    `base` and `data` may be given to share them between runs; the base is left as it was. Raises TrainingError, and
    ArtifactError if the server would refuse the fusion.
    """
    set_seed(run.optimization.seed)
    base = base or load_base(run.model, run.dtype)
    data = data or load_data(run.data, base.tokenizer, run.optimization.seed)
    members = read_members(run, base)
    config = make_fusion_config(run, base, members)
    params = make_params(config, base.modules)
    frame = RunFrame(run, base, data, [text for m in members for text in (m.digest, m.scalings_digest)])
    with fusion_in_place(base, config, params, members, run.score_dropout) as fusion:
        watch = FusionWatch(fusion, config.weight_names)
        hooks = Hooks(FusionPenalty(run, fusion, params), watch.observe, watch.metrics)
        trained = run_training(base.model, data, run, frame.checkpoint, hooks)
        watch.take()  # what an evaluation may have left
        held_out_loss = frame.judge(base.model, watch.observe)
        summary = frame.summarize("fusion", run.name, base.model, trained, held_out_loss, watch.take())
    config = replace(config, training=_describe_training(run, summary))
    with frame.writing() as staging:
        save_fusion(staging, config, params)
        _check_servable(staging, base)
        write_summary(staging, summary)
    frame.close()
    return summary


@contextmanager
def fusion_in_place(
    base: FrozenBase,
    config: FusionConfig,
    weighing: TokenWeighing,
    members: Sequence[LoRAWeights],
    dropout: float = 0.0,
) -> Iterator[UnfoldedFusion]:
    """The fusion on the base, unfolded, for the block; afterwards the base is as before."""
    fusion = UnfoldedFusion(base.model, config, weighing, members, dropout=dropout)
    base.model.to(base.model.device)  # type: ignore[arg-type]  # the fusion's tensors too
    try:
        yield fusion
    finally:
        fusion.remove()


def _describe_training(run: FusionRun, summary: TrainingSummary) -> dict[str, object]:
    """What the artifact itself tells; all of it is in the summary's file."""
    statistics = summary.fusion
    assert isinstance(statistics, FusionStatistics)
    loss = summary.held_out_loss
    return {
        "steps": summary.steps,
        "seed": run.optimization.seed,
        "learning_rate": run.optimization.learning_rate,
        "learned_tokens": summary.data["learned_tokens"],
        "trainable_parameters": summary.trainable_parameters,
        "seconds": summary.seconds,
        "held_out_loss": None if loss is None else round(loss, 6),
        "held_out_perplexity": None if loss is None else round(math.exp(min(loss, 700)), 4),
        "entropy": round(statistics.entropy, 6),
        "mean_weights": dict(statistics.mean_weights),
        **run.notes,
    }


def _check_servable(directory: Path, base: FrozenBase) -> None:
    """Reads the written fusion as the server does."""
    with open_directory(directory) as opened:
        config = in_call_order(read_fusion_config(opened), base.modules)
        read_fusion_params(opened, config, base.modules)
