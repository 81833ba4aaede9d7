"""Everything that the runs of the experiment share: base, adapters, texts, and how a weighing is measured."""

from __future__ import annotations

import lzma
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fusionserve.adapters.lora_weights import LoRAWeights
from fusionserve.config import EMBEDDED, EMBEDDED_ADAPTERS
from fusionserve.fusion.config import FusionConfig
from fusionserve.fusion.unfolded import TokenWeighing
from fusionserve.training.data import TrainingData, load_data, read_rows
from fusionserve.training.experiment.results import Result
from fusionserve.training.experiment.weighings import fixed
from fusionserve.training.frozen_base import FrozenBase, load_base
from fusionserve.training.fusion_measuring import PlacedFusion, placed_fusion
from fusionserve.training.fusion_members import make_fusion_config, read_members
from fusionserve.training.fusion_training import fusion_in_place, train_fusion
from fusionserve.training.rows import Row, digest_rows
from fusionserve.training_config import DataConfig, FusionRun, OptimizationConfig

MIXED = ("code_prose", "catalogues")
MAX_TOKENS = 512  # in a row, at training and at measuring
MAX_ROWS = 16  # of a text, at measuring
# Of the training text, to choose the best step by; the held-out text is for measuring alone.
_VALIDATION_SHARE = 0.04


@dataclass(frozen=True, slots=True)
class Measured:
    """What a weighing costs on every text, in nats per token, and what it gives each member there."""

    losses: Mapping[str, float]
    weights: Mapping[str, Mapping[str, float]]

    def as_result(self, system: str, seed: int, trained: int = 0, seconds: float = 0.0) -> Result:
        """For a system that trained so many parameters in so many seconds."""
        return Result(
            system=system,
            seed=seed,
            losses=self.losses,
            weights=self.weights,
            trained=trained,
            seconds=seconds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """The shipped base and adapters with the texts of the experiment."""

    base: FrozenBase
    adapters: Mapping[str, Path]
    data: TrainingData
    texts: Mapping[str, list[Row]]  # held-out text of each domain, then the mixed ones
    scratch: Path  # a folder of its own
    steps: int

    @property
    def domains(self) -> tuple[str, ...]:
        """Each has an adapter of its name."""
        return tuple(self.adapters)

    @property
    def identity(self) -> Mapping[str, object]:
        """What every result depends on."""
        config, _ = self.configure(self.fusion_run(self.scratch, seed=0))
        return {
            "steps": self.steps,
            "base": self.base.modules.fingerprint,
            "adapters": [member.digest for member in config.members],
            "data": self.data.digest,
            "texts": {name: digest_rows(rows) for name, rows in self.texts.items()},
        }

    def fusion_run(self, out: Path, seed: int, learning_rate: float = 1e-3) -> FusionRun:
        """A run over all adapters and domains."""
        return FusionRun(
            name="mix",
            out=out,
            members=tuple(self.adapters.items()),
            data=DataConfig(max_tokens=MAX_TOKENS),
            optimization=self.optimization(seed, learning_rate),
            show_progress=False,
        )

    def optimization(self, seed: int, learning_rate: float) -> OptimizationConfig:
        """What all that trains here is trained with."""
        return OptimizationConfig(
            learning_rate=learning_rate,
            steps=self.steps,
            batch_rows=4,
            bf16=True,
            seed=seed,
            eval_steps=max(1, self.steps // 2),
        )

    def configure(self, run: FusionRun) -> tuple[FusionConfig, list[LoRAWeights]]:
        """The configuration of a run, and its members."""
        members = read_members(run, self.base)
        return make_fusion_config(run, self.base, members), members

    def measure(
        self, config: FusionConfig, weighing: TokenWeighing, members: Sequence[LoRAWeights]
    ) -> Measured:
        """Measures a weighing on every text."""
        with fusion_in_place(self.base, config, weighing, members) as fusion:
            return self._measure(PlacedFusion(self.base, fusion, config.weight_names))

    def measure_fixed(self, system: str, adapters: Mapping[str, Path], weights: Sequence[float]) -> Result:
        """A result of adapters that have the same weights for every token."""
        run = replace(self.fusion_run(self.scratch, seed=0), members=tuple(adapters.items()))
        config, members = self.configure(run)
        return self.measure(config, fixed(config, weights), members).as_result(system, seed=0)

    def measure_fusion(self, directory: Path, adapters: Mapping[str, Path]) -> Measured:
        """Measures a written fusion on every text."""
        with placed_fusion(directory, self.base, adapters) as placed:
            return self._measure(placed)

    def train_fusion(self, system: str, run: FusionRun, data: TrainingData) -> Result:
        """The result of a fusion that is trained, written, and read again as the server reads it."""
        shutil.rmtree(run.checkpoints, ignore_errors=True)  # what an interrupted run left
        summary = train_fusion(run, base=self.base, data=data)
        measured = self.measure_fusion(run.out, dict(run.members))
        return measured.as_result(
            system, run.optimization.seed, summary.trainable_parameters, summary.seconds
        )

    def _measure(self, placed: PlacedFusion) -> Measured:
        found = {name: placed.measure(rows) for name, rows in self.texts.items()}
        return Measured(
            losses={name: loss.loss for name, (loss, _) in found.items()},
            weights={name: statistics.mean_weights for name, (_, statistics) in found.items()},
        )


def open_lab(texts: Path, scratch: Path, steps: int) -> Lab:
    """Reads the shipped model and the packed texts in `texts`."""
    base = load_base(None)
    adapters = {path.name: path for path in sorted(EMBEDDED_ADAPTERS.iterdir())}
    train = tuple(unpacked(texts / "train" / f"{domain}.txt.xz", scratch) for domain in adapters)
    shape = DataConfig(train=train, held_out_share=_VALIDATION_SHARE, max_tokens=MAX_TOKENS)
    held_out = {domain: EMBEDDED / "heldout" / f"{domain}.txt" for domain in adapters}
    mixed = {kind: unpacked(texts / "mixed" / f"{kind}.txt.xz", scratch) for kind in MIXED}
    return Lab(
        base=base,
        adapters=adapters,
        data=load_data(shape, base.tokenizer, seed=0),
        texts={
            name: read_rows(path, base.tokenizer, shape)[:MAX_ROWS]
            for name, path in {**held_out, **mixed}.items()
        },
        scratch=scratch,
        steps=steps,
    )


def unpacked(path: Path, scratch: Path) -> Path:
    """The text of an .xz file in a file of its own."""
    out = scratch / "texts" / path.parent.name / path.stem
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(lzma.decompress(path.read_bytes()))
    return out
