"""Command that prints what full fine-tuning, LoRA and QLoRA train, and what each holds in memory for it.

Counted on the loaded model: the base's weights as they lie in memory, and for every trained number its weight, gradient
and AdamW's two moments in float32. Activations come on top; they depend on the batch more than on the row.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from peft import LoraConfig, PeftModel, get_peft_model

from fusionserve.adapters.weight_bytes import count_parameters, weight_bytes
from fusionserve.training.frozen_base import FrozenBase, load_base
from fusionserve.training.target_modules import choose_targets

_BYTES_PER_TRAINED = 16  # weight, gradient and two moments
_MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """One way to train."""

    method: str
    trained: int
    parameters: int
    base_bytes: int

    @property
    def training_bytes(self) -> int:
        """Frozen weights, and everything that is kept for the trained ones."""
        return self.base_bytes + self.trained * _BYTES_PER_TRAINED

    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        return (
            self.method,
            f"{self.trained:,}",
            f"{self.trained / self.parameters:.2%}",
            f"{self.base_bytes / _MEBIBYTE:,.1f}",
            f"{self.training_bytes / _MEBIBYTE:,.1f}",
        )


def memory_rows(model: str | None, rank: int) -> Iterator[MemoryRow]:
    """Full fine-tuning in float32, LoRA over bfloat16 and QLoRA over NF4 weights, of one base."""
    base = load_base(model, "bfloat16")
    _, parameters = count_parameters(base.model)
    yield MemoryRow(method="full, float32", trained=parameters, parameters=parameters, base_bytes=0)
    for method, frozen in (
        ("LoRA, bfloat16 base", base),
        ("QLoRA, NF4 base", load_base(model, "bfloat16", "nf4")),
    ):
        base_bytes = weight_bytes(frozen.model)
        trained, _ = count_parameters(_add_lora(frozen, rank))
        yield MemoryRow(method=method, trained=trained, parameters=parameters, base_bytes=base_bytes)


def to_markdown(rows: Iterator[MemoryRow]) -> str:
    """The table."""
    lines = [
        ("method", "trained", "share", "frozen weights, MiB", "weights and optimizer, MiB"),
        ("---", "---:", "---:", "---:", "---:"),
        *(row.cells() for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder or a hub id; without it the embedded base")
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    print(to_markdown(memory_rows(arguments.model, arguments.rank)))


def _add_lora(base: FrozenBase, rank: int) -> PeftModel:
    config = LoraConfig(r=rank, target_modules=list(choose_targets(base, ())), task_type="CAUSAL_LM")
    adapted = get_peft_model(base.model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


if __name__ == "__main__":
    main()
