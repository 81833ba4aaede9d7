"""The systems that are compared: what each is, and how it is trained."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import set_seed

from fusionserve.adapters.weight_bytes import count_parameters
from fusionserve.config import EMBEDDED_FUSIONS
from fusionserve.fusion.config import FusionConfig
from fusionserve.fusion.unfolded import TokenWeighing
from fusionserve.training.adaptation_trainer import run_training
from fusionserve.training.experiment.lab import Lab
from fusionserve.training.experiment.results import Result, Results
from fusionserve.training.experiment.weighings import fixed, gates
from fusionserve.training.fusion_training import fusion_in_place
from fusionserve.training_config import FusionRun

BASE, UNIFORM, STATIC, GATE, FUSION = "base", "uniform blend", "best static blend", "linear gate", "fusion"
GATE_WITH_VALUE = "linear gate, V low rank"
SHIPPED = "shipped fusion"
_SHIPPED_FUSION = EMBEDDED_FUSIONS / "domains"
LOW_RANK = "fusion, V low rank"
# The options of `fusionserve train fusion` that make each variant.
VARIANTS: Mapping[str, Mapping[str, object]] = {
    FUSION: {},
    "fusion, no member keys": {"member_keys": False},
    "fusion, module scope": {"scope": "module"},
    "fusion, V diagonal": {"value": "diagonal"},
    LOW_RANK: {"value": "low_rank", "value_rank": 32, "value_penalty": 0.0},
    "fusion, rate 0.004": {"learning_rate": 4e-3},
}
_BLEND_RATE = 0.02  # five numbers, far from where they begin
_GATES = {GATE: FUSION, GATE_WITH_VALUE: LOW_RANK}  # otherwise as the variant


def run_systems(lab: Lab, results: Results, seeds: Sequence[int]) -> Iterator[Result]:
    """Every system; those that train, with every seed."""
    for name, weights in fixed_systems(lab.domains).items():
        yield results.get(name, 0, partial(lab.measure_fixed, name, lab.adapters, weights))
    yield results.get(SHIPPED, 0, partial(_measure_shipped, lab), _shipped_digests())
    for seed in seeds:
        yield results.get(STATIC, seed, partial(_train_blend, lab, seed), {"rate": _BLEND_RATE})
        for name, variant in _GATES.items():
            yield results.get(name, seed, partial(_train_gates, lab, name, seed), VARIANTS[variant])
        for name, options in VARIANTS.items():
            yield results.get(name, seed, partial(_train_variant, lab, name, seed), options)


def fixed_systems(domains: Sequence[str]) -> dict[str, list[float]]:
    """The base, every adapter alone, and all of them evenly."""
    singles = {name: [float(name == other) for other in domains] for name in domains}
    return {BASE: [0.0] * len(domains), **singles, UNIFORM: [1 / len(domains)] * len(domains)}


def _measure_shipped(lab: Lab) -> Result:
    """The fusion that the server knows as `domains`."""
    return lab.measure_fusion(_SHIPPED_FUSION, lab.adapters).as_result(SHIPPED, seed=0)


def _shipped_digests() -> Mapping[str, object]:
    files = sorted(_SHIPPED_FUSION.glob("fusion_*"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _train_blend(lab: Lab, seed: int) -> Result:
    run = lab.fusion_run(lab.scratch / "blend", seed, _BLEND_RATE)
    even = [1 / len(lab.domains)] * len(lab.domains)
    return _train_weighing(lab, STATIC, run, lambda config: fixed(config, even, trains=True))


def _train_gates(lab: Lab, name: str, seed: int) -> Result:
    run = _variant_run(lab, lab.scratch / "gate", _GATES[name], seed)
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
    return measured.as_result(name, run.optimization.seed, num_trained, trained.seconds)


def _train_variant(lab: Lab, name: str, seed: int) -> Result:
    out = lab.scratch / "fusions" / f"{list(VARIANTS).index(name)}-{seed}"
    return lab.train_fusion(name, _variant_run(lab, out, name, seed), lab.data)


def _variant_run(lab: Lab, out: Path, name: str, seed: int) -> FusionRun:
    options = dict(VARIANTS[name])
    run = lab.fusion_run(out, seed)
    rate = options.pop("learning_rate", run.optimization.learning_rate)
    options["optimization"] = replace(run.optimization, learning_rate=rate)  # type: ignore[arg-type]
    return replace(run, **options)  # type: ignore[arg-type]
