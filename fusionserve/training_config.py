"""Frozen configuration of training runs: what `fusionserve train` and experiment scripts ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What a run learns from, and how examples become rows of tokens."""

    train: tuple[Path, ...] = ()  # .jsonl, or .txt with documents
    held_out: tuple[Path, ...] = ()  # own files; without any a share of the training examples is held out
    held_out_share: float = 0.1
    max_examples: int | None = None  # drawn from each training file; None: all
    max_tokens: int = 512  # in a row
    packing: bool = True  # several examples in a row, which do not see each other
    template: str = "auto"  # auto, plain, alpaca or a file: how an instruction and its input become a prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizationConfig:
    """How the weights are trained. One step reads `batch_rows` times `accumulation` rows."""

    learning_rate: float
    steps: int | None = None  # None: as many as `epochs` take
    epochs: float = 1.0
    batch_rows: int = 8
    accumulation: int = 1
    schedule: str = "linear"  # linear, cosine or constant, after the warm-up
    warmup_share: float = 0.05
    weight_decay: float = 0.0  # of matrices; not of biases, member keys and a diagonal V
    max_grad_norm: float = 1.0
    bf16: bool = False  # matrix products in bfloat16; the trained weights are float32
    eval_steps: int | None = None  # between evaluations and checkpoints; None: ten in the run
    patience: int | None = None  # evaluations without a better loss before training stops; None: never
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """What both stages share."""

    out: Path  # the directory that is written
    data: DataConfig
    optimization: OptimizationConfig
    model: str | None = None  # a folder or a hub id; None: the embedded base
    dtype: str = "auto"  # of the base weights: the checkpoint's, bfloat16 for one in float16
    work_dir: Path | None = None  # for checkpoints; None: `out` with .work behind it
    resume: bool = False  # from the last complete checkpoint in `work_dir`
    keep_checkpoints: bool = False
    show_progress: bool = True

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are written while the run lasts."""
        return self.work_dir or self.out.with_name(f"{self.out.name}.work")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRun(TrainingRun):
    """Stage 1: a LoRA adapter."""

    rank: int = 16
    alpha: float | None = None  # None: twice the rank
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()  # last names; empty: every linear module of the layers
    use_rslora: bool = False
    quantize: str = "none"  # nf4: the base in NF4 with double quantization (QLoRA)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionRun(TrainingRun):
    """Stage 2: an AdapterFusion over frozen adapters."""

    name: str
    members: tuple[tuple[str, Path], ...]  # names and directories, in the order of the weights
    modules: tuple[str, ...] = ()  # last names or patterns; empty: every module that a member adapts
    scope: str = "layer"  # or module
    d_key: int = 64
    member_keys: bool = True
    value: str = "none"  # or diagonal, low_rank
    value_rank: int = 8  # for low_rank
    value_penalty: float = 0.01  # times the squared distance of every V from the identity
    temperature: float = 1.0
    base_member: bool = False
    score_dropout: float = 0.0
    entropy_penalty: float = 0.0  # times the mean entropy of the weights: sharper choices
    balance_penalty: float = 0.0  # times the squared distance of the mean weights from even ones
    allow_base_mismatch: bool = False
    notes: dict[str, object] = field(default_factory=dict)  # kept in the artifact's training summary
