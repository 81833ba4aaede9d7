"""Command that prints held-out perplexity of the base and of every adapter on every domain.

It fails unless every adapter is far enough below the base on the domain of its own name.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusionserve.config import EMBEDDED
from fusionserve.training.frozen_base import load_base
from fusionserve.training.fusion_measuring import placed_fusion
from fusionserve.training.loop import next_token_loss
from fusionserve.training.tokens import TokenStream, consecutive_windows, encode_file

BASE = "base"
_BATCH_WINDOWS = 2  # with more, logits are written to memory that the system has yet to give


@dataclass(frozen=True, slots=True)
class Table:
    """Perplexity by domain, then by model: the base or an adapter."""

    rows: dict[str, dict[str, float]]

    def gain(self, domain: str) -> float:
        """The share by which the domain's own adapter lowers the base's perplexity."""
        return 1 - self.rows[domain][domain] / self.rows[domain][BASE]

    def to_markdown(self) -> str:
        """Render one line for each domain, closed by the gain of its own adapter."""
        names = list(next(iter(self.rows.values())))
        lines = [["held-out text", *names, "own adapter against base"], ["---"] * (len(names) + 2)]
        for domain, row in self.rows.items():
            lines.append([domain, *(f"{row[name]:.2f}" for name in names), f"{-self.gain(domain):+.1%}"])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def load_adapted(embedded: Path) -> tuple[PeftModel, list[str]]:
    """Load the base in float32 with all its adapters, and name the adapters."""
    base = AutoModelForCausalLM.from_pretrained(embedded / "base", dtype=torch.float32)
    names = sorted(path.parent.name for path in embedded.glob("adapters/*/adapter_config.json"))
    model = PeftModel.from_pretrained(base, embedded / "adapters" / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(embedded / "adapters" / name, adapter_name=name)
    return model.eval(), names


@torch.inference_mode()
def perplexity(model: nn.Module, stream: TokenStream, length: int, max_tokens: int) -> float:
    """Exponential of the mean loss over the first windows of a stream, each read on its own."""
    windows = consecutive_windows(stream, length)[: max(1, max_tokens // length)]
    losses = [
        next_token_loss(model, batch).item() * len(batch) for batch in torch.split(windows, _BATCH_WINDOWS)
    ]
    return math.exp(sum(losses) / len(windows))


def evaluate(embedded: Path, length: int, max_tokens: int) -> Table:
    """Measure every model on every domain that has an adapter."""
    tokenizer = AutoTokenizer.from_pretrained(embedded / "base")
    model, names = load_adapted(embedded)
    rows: dict[str, dict[str, float]] = {}
    for domain in tqdm(names):
        stream = encode_file(embedded / "heldout" / f"{domain}.txt", tokenizer)
        with model.disable_adapter():
            rows[domain] = {BASE: perplexity(model, stream, length, max_tokens)}
        for name in names:
            model.set_adapter(name)
            rows[domain][name] = perplexity(model, stream, length, max_tokens)
    for domain, measured in evaluate_fusions(embedded, list(rows), length, max_tokens).items():
        rows[domain] |= measured
    return Table(rows)


def evaluate_fusions(
    embedded: Path, domains: list[str], length: int, max_tokens: int
) -> dict[str, dict[str, float]]:
    """Measure every fusion, which is told no domain, on the same windows; perplexity by domain, then by fusion."""
    base = load_base(str(embedded / "base"), dtype="float32")
    members = {path.name: path for path in (embedded / "adapters").iterdir()}
    rows: dict[str, dict[str, float]] = {domain: {} for domain in domains}
    for path in sorted(embedded.glob("fusions/*/")):
        with placed_fusion(path, base, members, allow_base_mismatch=True) as placed:
            for domain in domains:
                stream = encode_file(embedded / "heldout" / f"{domain}.txt", base.tokenizer)
                rows[domain][f"fusion {path.name}"] = perplexity(
                    placed.base.model, stream, length, max_tokens
                )
    return rows


def main() -> None:
    """Print the table; exit with 1 if an adapter misses the margin on its own domain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--embedded", type=Path, default=EMBEDDED, help="folder with base, adapters and heldout"
    )
    parser.add_argument("--length", type=int, default=512, help="tokens of context")
    parser.add_argument("--max-tokens", type=int, default=8_192, help="tokens of each domain to read")
    parser.add_argument("--margin", type=float, default=0.15)
    arguments = parser.parse_args()
    table = evaluate(arguments.embedded, arguments.length, arguments.max_tokens)
    print(table.to_markdown())
    missed = [domain for domain in table.rows if table.gain(domain) < arguments.margin]
    if missed:
        sys.exit(f"less than {arguments.margin:.0%} below the base: {', '.join(missed)}")


if __name__ == "__main__":
    main()
