"""The systems that are compared: what each is, and how it is trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from transformers import set_seed

from fusionserve.adapters.weight_bytes import count_parameters
from fusionserve.config import EMBEDDED
from fusionserve.fusion.config import FusionConfig
from fusionserve.fusion.unfolded import TokenWeighing
from fusionserve.training.adaptation_trainer import run_training
from fusionserve.training.experiment.lab import Lab
from fusionserve.training.experiment.results import Result, Results
from fusionserve.training.experiment.weighings import fixed, gates
from fusionserve.training.fusion_training import fusion_in_place, train_fusion
from fusionserve.training_config import FusionRun

BASE, UNIFORM, STATIC, GATE, FUSION = "base", "uniform blend", "best static blend", "linear gate", "fusion"
GATE_WITH_VALUE = "linear gate, V low rank"
SHIPPED = "shipped fusion"
LOW_RANK = "fusion, V low rank"
# The options of `fusionserve train fusion` that make each variant.
VARIANTS: Mapping[str, Mapping[str, object]] = {
    FUSION: {},
    "fusion, no member keys": {"member_keys": False},
    "fusion, module scope": {"scope": "module"},
    "fusion, V diagonal": {"value": "diagonal"},
    LOW_RANK: {"value": "low_rank", "value_rank": 32, "value_penalty": 0.0},
}
_BLEND_RATE = 0.02  # five numbers, far from where they begin
_SHIPPED_SEED = 0


def run_systems(lab: Lab, results: Results, seeds: Sequence[int]) -> Iterator[Result]:
    """Every system; those that train, with every seed."""
    for name, weights in fixed_systems(lab.domains).items():
        yield results.get(name, 0, partial(_measure_fixed, lab, name, weights))
    yield results.get(SHIPPED, _SHIPPED_SEED, partial(_measure_shipped, lab))
    for seed in seeds:
        yield results.get(STATIC, seed, partial(_train_blend, lab, seed))
        yield results.get(GATE, seed, partial(_train_gates, lab, GATE, FUSION, seed))
        yield results.get(GATE_WITH_VALUE, seed, partial(_train_gates, lab, GATE_WITH_VALUE, LOW_RANK, seed))
        for name in VARIANTS:
            yield results.get(name, seed, partial(_train_variant, lab, name, seed))


def fixed_systems(domains: Sequence[str]) -> dict[str, list[float]]:
    """The base, every adapter alone, and all of them evenly."""
    singles = {name: [float(name == other) for other in domains] for name in domains}
    return {BASE: [0.0] * len(domains), **singles, UNIFORM: [1 / len(domains)] * len(domains)}


def _measure_fixed(lab: Lab, name: str, weights: Sequence[float]) -> Result:
    return Result(system=name, seed=0, losses=lab.measure_fixed(lab.adapters, weights).losses)


def _measure_shipped(lab: Lab) -> Result:
    """The fusion that the server knows as `domains`."""
    measured = lab.measure_fusion(EMBEDDED / "fusions" / "domains", lab.adapters)
    return Result(system=SHIPPED, seed=_SHIPPED_SEED, losses=measured.losses, weights=measured.weights)


def _train_blend(lab: Lab, seed: int) -> Result:
    run = lab.fusion_run(lab.scratch / "blend", seed, _BLEND_RATE)
    even = [1 / len(lab.domains)] * len(lab.domains)
    return _train_weighing(lab, STATIC, run, lambda config: fixed(config, even, trains=True))


def _train_gates(lab: Lab, name: str, variant: str, seed: int) -> Result:
    """Linear gates, otherwise as the variant."""
    run = replace(lab.fusion_run(lab.scratch / "gate", seed), **VARIANTS[variant])  # type: ignore[arg-type]
    return _train_weighing(lab, name, run, lambda config: gates(config, lab.base.modules))


def _train_weighing(
    lab: Lab, name: str, run: FusionRun, make: Callable[[FusionConfig], TokenWeighing]
) -> Result:
    """Trains what is no fusion by the trainer of fusions."""
    set_seed(run.optimization.seed)
    config, members = lab.configure(run)
    weighing = make(config)
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    with fusion_in_place(lab.base, config, weighing, members):
        trained = run_training(lab.base.model, lab.data, run, checkpoint=None)
        num_trained, _ = count_parameters(lab.base.model)
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    measured = lab.measure(config, weighing, members)
    return Result(
        system=name,
        seed=run.optimization.seed,
        losses=measured.losses,
        weights=measured.weights,
        trained=num_trained,
        seconds=trained.seconds,
    )


def _train_variant(lab: Lab, name: str, seed: int) -> Result:
    """A fusion, written and read again as the server reads it."""
    out = lab.scratch / "fusions" / f"{list(VARIANTS).index(name)}-{seed}"
    run = replace(lab.fusion_run(out, seed), **VARIANTS[name])  # type: ignore[arg-type]
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    summary = train_fusion(run, base=lab.base, data=lab.data)
    measured = lab.measure_fusion(out, lab.adapters)
    return Result(
        system=name,
        seed=seed,
        losses=measured.losses,
        weights=measured.weights,
        trained=summary.trainable_parameters,
        seconds=summary.seconds,
    )
