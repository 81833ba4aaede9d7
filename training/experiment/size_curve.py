"""What a few examples of a new domain are worth: an adapter of its own, against a fusion with the adapters there are.

In the spirit of AdapterFusion's Table 1 (arXiv 2005.00247): small target sets gain most. Both stages see the same
examples, as in the paper.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

from fusionserve.training.adapter_training import train_adapter
from fusionserve.training.data import TrainingData, load_data, read_rows
from fusionserve.training.documents import END_OF_TEXT, read_texts
from fusionserve.training.experiment.lab import MAX_ROWS, MAX_TOKENS, Lab, unpacked
from fusionserve.training.experiment.results import Result, Results
from fusionserve.training.experiment.systems import fixed_systems
from fusionserve.training.fusion_training import train_fusion
from fusionserve.training_config import AdapterRun, DataConfig, OptimizationConfig

SIZES = (50, 200, 1000)
STEPS = 100  # at most
OWN, WITH_OWN, OTHERS = "own adapter", "fusion of all and it", "fusion of the others"
NEW = "messages"
_RANK = 16
_TARGETS = ("o_proj", "gate_proj", "up_proj", "down_proj")  # as the shipped adapters
_VALIDATION_SHARE = 0.1  # of the examples: they say which step was best
_PATIENCE = 3
_ADAPTER_RATE, _FUSION_RATE = 4e-3, 1e-3


def run_size_curve(
    lab: Lab, texts: Path, results: Results, seeds: Sequence[int]
) -> Iterator[tuple[int, Result]]:
    """(number of examples, result) of each way, size and seed; losses are on held-out text of the new domain."""
    held_out = unpacked(texts / NEW / "held_out.txt.xz", lab.scratch)
    rows = read_rows(held_out, lab.base.tokenizer, DataConfig(max_tokens=MAX_TOKENS))[:MAX_ROWS]
    new = replace(lab, texts={NEW: rows})
    source = read_texts(unpacked(texts / NEW / "train.txt.xz", lab.scratch))
    for name, weights in fixed_systems(lab.domains).items():
        yield (
            0,
            results.get(f"{NEW} {name}", 0, partial(_measure_fixed, new, name, weights)),
        )
    for size in SIZES:
        for seed in seeds:
            data = _examples(new, source, size, seed)
            own = new.scratch / "size" / f"{size}-{seed}" / NEW
            ways: Mapping[str, Callable[[], Result]] = {
                OWN: partial(_train_own, new, data, own, seed),
                WITH_OWN: partial(_train_with_own, new, data, own, seed),
                OTHERS: partial(_train_fusion, new, data, OTHERS, new.adapters, seed),
            }
            for name, make in ways.items():
                yield size, results.get(f"{name} {size}", seed, make)


def _measure_fixed(lab: Lab, name: str, weights: Sequence[float]) -> Result:
    return Result(system=name, seed=0, losses=lab.measure_fixed(lab.adapters, weights).losses)


def _examples(lab: Lab, source: Sequence[str], size: int, seed: int) -> TrainingData:
    """Data of `size` examples drawn by the seed."""
    path = lab.scratch / "texts" / f"{NEW}-{size}-{seed}.txt"
    chosen = Random(seed).sample(source, size)
    path.write_text("".join(f"{text.rstrip()}\n{END_OF_TEXT}\n" for text in chosen), encoding="utf-8")
    shape = DataConfig(train=(path,), held_out_share=_VALIDATION_SHARE, max_tokens=MAX_TOKENS)
    return load_data(shape, lab.base.tokenizer, seed)


def _optimization(seed: int, learning_rate: float) -> OptimizationConfig:
    """Stops when the validation examples say so."""
    return OptimizationConfig(
        learning_rate=learning_rate,
        steps=STEPS,
        batch_rows=4,
        bf16=True,
        seed=seed,
        eval_steps=max(1, STEPS // 10),
        patience=_PATIENCE,
    )


def _train_own(lab: Lab, data: TrainingData, out: Path, seed: int) -> Result:
    run = AdapterRun(
        out=out,
        rank=_RANK,
        target_modules=_TARGETS,
        data=DataConfig(max_tokens=MAX_TOKENS),
        optimization=_optimization(seed, _ADAPTER_RATE),
        show_progress=False,
    )
    _forget(run.checkpoints)
    summary = train_adapter(run, base=lab.base, data=data)
    measured = lab.measure_fixed({NEW: out}, [1.0])
    return Result(
        system=OWN,
        seed=seed,
        losses=measured.losses,
        trained=summary.trainable_parameters,
        seconds=summary.seconds,
    )


def _train_with_own(lab: Lab, data: TrainingData, own: Path, seed: int) -> Result:
    """A fusion of all adapters and the new domain's own, which an interrupted experiment may not have kept."""
    if not (own / "adapter_config.json").is_file():
        _train_own(lab, data, own, seed)
    return _train_fusion(lab, data, WITH_OWN, {**lab.adapters, NEW: own}, seed)


def _train_fusion(lab: Lab, data: TrainingData, name: str, adapters: Mapping[str, Path], seed: int) -> Result:
    run = replace(
        lab.fusion_run(lab.scratch / "size" / "fusion", seed),
        members=tuple(adapters.items()),
        optimization=_optimization(seed, _FUSION_RATE),
    )
    _forget(run.checkpoints)
    summary = train_fusion(run, base=lab.base, data=data)
    measured = lab.measure_fusion(run.out, adapters)
    return Result(
        system=name,
        seed=seed,
        losses=measured.losses,
        weights=measured.weights,
        trained=summary.trainable_parameters,
        seconds=summary.seconds,
    )


def _forget(checkpoints: Path) -> None:
    """What a run that was interrupted left."""
    shutil.rmtree(checkpoints, ignore_errors=True)
