"""What a run came to: a table for the terminal, a JSON file and a picture beside the weights. None names a path."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fusionserve.training.training_plot import draw_training

SUMMARY_FILE = "training_summary.json"
PLOT_FILE = "training.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionStatistics:
    """What a fusion attends to on the held-out rows (on the training rows if there are none)."""

    entropy: float  # nats, mean over tokens and attentions; ln(members) is the most
    mean_weights: Mapping[str, float]  # by member
    by_attention: Mapping[str, Mapping[str, float]]  # by the attention's module, then by member


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSummary:
    """Everything that is worth telling about a finished run."""

    kind: str  # adapter or fusion
    name: str
    base_model: str
    settings: Mapping[str, object]  # the run's, without paths
    data: Mapping[str, int]
    steps: int
    best_step: int | None
    trainable_parameters: int
    total_parameters: int
    seconds: float
    peak_memory_bytes: int  # resident set
    peak_device_bytes: int
    base_bytes: int  # of the frozen weights
    train_loss: float | None  # mean over the last logged steps
    held_out_loss: float | None  # of the weights that were written
    held_out_loss_before: float | None  # of the untrained run
    history: tuple[Mapping[str, float], ...]
    fusion: FusionStatistics | None = None

    @property
    def trainable_share(self) -> float:
        """Trained parameters by all parameters."""
        return self.trainable_parameters / self.total_parameters

    def to_json(self) -> str:
        """The file's text."""
        fields = asdict(self)
        perplexity = None if self.held_out_loss is None else math.exp(min(self.held_out_loss, 700))
        fields |= {"trainable_share": self.trainable_share, "held_out_perplexity": perplexity}
        fields["history"] = [{name: _short(value) for name, value in entry.items()} for entry in self.history]
        return json.dumps(fields, indent=2) + "\n"

    def to_table(self) -> str:
        """Aligned lines for the terminal."""
        lines = list(self._lines())
        width = max(len(label) for label, _ in lines)
        return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)

    def _lines(self) -> list[tuple[str, str]]:
        data = self.data
        lines = [
            (self.kind, f"{self.name} on {self.base_model}"),
            (
                "learned from",
                f"{data['learned_tokens']:,} of {data['train_tokens']:,} tokens in {data['train_rows']:,} rows",
            ),
            ("steps", f"{self.steps}" + ("" if self.best_step is None else f", best at {self.best_step}")),
            (
                "trainable",
                f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters ({self.trainable_share:.2%})",
            ),
            ("time", f"{self.seconds:.1f} s"),
            ("peak memory", _memory(self)),
        ]
        if data["examples_cut"] or data["examples_dropped"]:
            text = f"{data['examples_cut']} examples cut, {data['examples_dropped']} left out with nothing to learn"
            lines.append(("too long", text))
        if self.held_out_loss is not None:
            lines.append(("held out", _held_out(self.held_out_loss, self.held_out_loss_before)))
        if self.fusion is not None:
            weights = "  ".join(f"{name} {weight:.2f}" for name, weight in self.fusion.mean_weights.items())
            most = math.log(max(1, len(self.fusion.mean_weights)))
            lines += [("mean weights", weights), ("entropy", f"{self.fusion.entropy:.2f} of {most:.2f} nats")]
        return lines


def write_summary(directory: Path, summary: TrainingSummary) -> None:
    """Writes both files."""
    (directory / SUMMARY_FILE).write_text(summary.to_json(), encoding="utf-8")
    draw_training(directory / PLOT_FILE, f"{summary.kind} {summary.name}", summary.history, summary.best_step)


def last_losses(history: tuple[Mapping[str, float], ...]) -> tuple[float | None, float | None]:
    """(mean training loss of the last tenth of the logged steps, held-out loss before training)."""
    losses = [entry["loss"] for entry in history if "loss" in entry]
    tail = losses[-max(1, len(losses) // 10) :]
    before = next(
        (entry["eval_loss"] for entry in history if entry.get("step") == 0 and "eval_loss" in entry), None
    )
    return (sum(tail) / len(tail) if tail else None), before


def _held_out(loss: float, before: float | None) -> str:
    text = f"loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}"
    return text if before is None else f"{text} (before training {math.exp(min(before, 700)):.2f})"


def _memory(summary: TrainingSummary) -> str:
    device = f", {summary.peak_device_bytes / 2**20:,.0f} MiB on the GPU" if summary.peak_device_bytes else ""
    return (
        f"{summary.peak_memory_bytes / 2**20:,.0f} MiB resident{device}; "
        f"the base's weights take {summary.base_bytes / 2**20:,.1f} MiB"
    )


def _short(value: float) -> float:
    return round(value, 6) if isinstance(value, float) else value
