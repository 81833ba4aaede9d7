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

from fusionserve.artifact_folders import ADAPTER_CONFIG
from fusionserve.training.adapter_training import train_adapter
from fusionserve.training.adapters import ADAPTED_MODULES
from fusionserve.training.data import TrainingData, load_data, read_rows
from fusionserve.training.documents import join_texts, read_texts
from fusionserve.training.experiment.lab import MAX_ROWS, MAX_TOKENS, Lab, unpacked
from fusionserve.training.experiment.results import Result, Results
from fusionserve.training.experiment.systems import fixed_systems
from fusionserve.training.rows import digest_rows
from fusionserve.training_config import AdapterRun, DataConfig, OptimizationConfig

SIZES = (50, 200, 1000)
STEPS = 100  # at most
OWN, WITH_OWN, OTHERS = "own adapter", "fusion of all and it", "fusion of the others"
NEW = "messages"
_RANK = 16
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
        measure = partial(new.measure_fixed, name, new.adapters, weights)
        yield 0, results.get(f"{NEW} {name}", 0, measure, {"text": digest_rows(rows)})
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
                own_settings = {"data": data.digest, "text": digest_rows(rows), "steps": STEPS}
                yield size, results.get(f"{name} {size}", seed, make, own_settings)


def _examples(lab: Lab, source: Sequence[str], size: int, seed: int) -> TrainingData:
    """Data of `size` examples drawn by the seed."""
    path = lab.scratch / "texts" / f"{NEW}-{size}-{seed}.txt"
    chosen = Random(seed).sample(source, size)
    path.write_text(join_texts(chosen), encoding="utf-8")
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
        target_modules=tuple(ADAPTED_MODULES),
        data=DataConfig(max_tokens=MAX_TOKENS),
        optimization=_optimization(seed, _ADAPTER_RATE),
        show_progress=False,
    )
    shutil.rmtree(run.checkpoints, ignore_errors=True)  # what an interrupted run left
    summary = train_adapter(run, base=lab.base, data=data)
    measured = lab.measure_fixed(OWN, {NEW: out}, [1.0])
    return replace(measured, seed=seed, trained=summary.trainable_parameters, seconds=summary.seconds)


def _train_with_own(lab: Lab, data: TrainingData, own: Path, seed: int) -> Result:
    """A fusion of all adapters and the new domain's own, which an interrupted experiment may not have kept."""
    if not (own / ADAPTER_CONFIG).is_file():
        _train_own(lab, data, own, seed)
    return _train_fusion(lab, data, WITH_OWN, {**lab.adapters, NEW: own}, seed)


def _train_fusion(lab: Lab, data: TrainingData, name: str, adapters: Mapping[str, Path], seed: int) -> Result:
    run = replace(
        lab.fusion_run(lab.scratch / "size" / "fusion", seed),
        members=tuple(adapters.items()),
        optimization=_optimization(seed, _FUSION_RATE),
    )
    return lab.train_fusion(name, run, data)
