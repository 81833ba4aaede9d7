"""The rows of a run: read, split into training and held-out examples, and encoded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

from transformers import PreTrainedTokenizerBase

from fusionserve.errors import TrainingError
from fusionserve.training.examples import Example, read_examples
from fusionserve.training.prompt_template import choose_template
from fusionserve.training.rows import Losses, Row, RowShape, digest_rows, make_rows
from fusionserve.training_config import DataConfig


@dataclass(frozen=True, eq=False)  # no slots: the digest is computed once
class TrainingData:
    """Rows to learn from and rows to judge by; the latter may be empty."""

    train: list[Row]
    held_out: list[Row]
    losses: Losses

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of all rows."""
        return digest_rows([*self.train, *self.held_out])

    def describe(self) -> dict[str, int]:
        """Counts for the summary of the run."""
        return {
            "train_rows": len(self.train),
            "train_tokens": sum(map(len, self.train)),
            "learned_tokens": sum(row.num_learned for row in self.train),
            "held_out_rows": len(self.held_out),
            "held_out_tokens": sum(row.num_learned for row in self.held_out),
            "examples_cut": self.losses.num_cut,
            "examples_dropped": self.losses.num_dropped,
        }


def load_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> TrainingData:
    """Raises TrainingError if a file is wrong or nothing is left to learn from or to judge by."""
    templates = choose_template(config.template)
    files = [read_examples(path, templates, tokenizer) for path in config.train]
    examples = [example for file in files for example in _draw(file, config.max_examples, seed)]
    held_out = [example for path in config.held_out for example in read_examples(path, templates, tokenizer)]
    if not held_out and config.held_out_share > 0:
        examples, held_out = _split(examples, config.held_out_share, seed)
    shape = RowShape(config.max_tokens, config.packing)
    data = TrainingData(
        make_rows(examples, tokenizer, shape, seed), make_rows(held_out, tokenizer, shape, seed), shape.losses
    )
    if not data.train or (held_out and not data.held_out):
        raise TrainingError(f"no example has anything to learn within {config.max_tokens} tokens")
    return data


def read_rows(path: Path, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[Row]:
    """The rows of one file, for measuring."""
    examples = read_examples(path, choose_template(config.template), tokenizer)
    return make_rows(examples, tokenizer, RowShape(config.max_tokens, config.packing), seed=0)


def _draw(examples: list[Example], max_examples: int | None, seed: int) -> list[Example]:
    if max_examples is None or max_examples >= len(examples):
        return examples
    return Random(seed).sample(examples, max_examples)


def _split(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    if len(examples) < 2:
        raise TrainingError(
            "one example cannot be split; give a held-out file, or --held-out-share 0 to go without"
        )
    shuffled = Random(seed).sample(examples, len(examples))
    num_held_out = min(max(1, round(share * len(examples))), len(examples) - 1)
    return shuffled[num_held_out:], shuffled[:num_held_out]
