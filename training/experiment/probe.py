"""Command that asks where in the base a token tells its domain: a linear probe of what every module reads.

A fusion can weigh its members by no more than what its attention sees. Prints the share of held-out tokens of which
a linear classifier of a module's input names the domain.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fusionserve.adapters.base_modules import ModuleKind
from fusionserve.config import EMBEDDED, EMBEDDED_ADAPTERS
from fusionserve.training.experiment.lab import MAX_TOKENS, unpacked
from fusionserve.training.frozen_base import FrozenBase, load_base
from fusionserve.training.quiet_libraries import keep_libraries_quiet
from fusionserve.training.tokens import consecutive_windows, encode_file

_TRAIN_WINDOWS, _HELD_OUT_WINDOWS = 40, 12  # of each domain
_STEPS, _BATCH_TOKENS, _LEARNING_RATE = 400, 2048, 2e-3
_NAMES = ("q_proj", "o_proj", "gate_proj", "down_proj")  # the others read what one of these reads


def probe(base: FrozenBase, train: Sequence[Path], held_out: Sequence[Path]) -> Iterator[tuple[str, float]]:
    """(module path, accuracy on held-out tokens); the files are in the order of their labels."""
    inputs, labels = _read(base, train, _TRAIN_WINDOWS)
    held_out_inputs, held_out_labels = _read(base, held_out, _HELD_OUT_WINDOWS)
    for path, x in inputs.items():
        mean, deviation = x.mean(dim=0), x.std(dim=0) + 1e-6
        classifier = _fit((x - mean) / deviation, labels, len(train))
        with torch.no_grad():
            guesses = classifier((held_out_inputs[path] - mean) / deviation).argmax(dim=-1)
        yield path, float((guesses == held_out_labels).float().mean())


def main() -> None:
    """Print a table of layers by modules."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, default=Path("examples/fusion_data"), help="the packed texts")
    arguments = parser.parse_args()
    keep_libraries_quiet()
    torch.manual_seed(0)
    domains = sorted(path.name for path in EMBEDDED_ADAPTERS.iterdir())
    base = load_base(None)
    with tempfile.TemporaryDirectory() as scratch:
        train = [
            unpacked(arguments.texts / "train" / f"{domain}.txt.xz", Path(scratch)) for domain in domains
        ]
        held_out = [EMBEDDED / "heldout" / f"{domain}.txt" for domain in domains]
        print(_to_markdown(dict(probe(base, train, held_out))))


def _read(base: FrozenBase, files: Sequence[Path], num_windows: int) -> tuple[dict[str, Tensor], Tensor]:
    """What the modules read of all files, [tokens, d_in] by path, and the number of each token's file [tokens]."""
    labels = []
    with _inputs_of(base) as seen, torch.no_grad():
        for label, file in enumerate(files):
            windows = consecutive_windows(encode_file(file, base.tokenizer), MAX_TOKENS)[:num_windows]
            base.model(input_ids=windows, use_cache=False, logits_to_keep=1)
            labels.append(torch.full((windows.numel(),), label))
    return {path: torch.cat(parts) for path, parts in seen.items()}, torch.cat(labels)


@contextmanager
def _inputs_of(base: FrozenBase) -> Iterator[dict[str, list[Tensor]]]:
    """Collects the inputs of the modules, by path, for the block."""
    seen: dict[str, list[Tensor]] = {
        path: []
        for path, module in base.modules.by_path.items()
        if module.kind is not ModuleKind.EMBEDDING and path.endswith(_NAMES)
    }

    def keep(path: str) -> object:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen[path].append(arguments[0].detach().flatten(0, -2).float())

        return base.model.get_submodule(path).register_forward_pre_hook(hook)

    handles = [keep(path) for path in seen]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]


def _fit(x: Tensor, labels: Tensor, num_labels: int) -> nn.Linear:
    classifier = nn.Linear(x.shape[1], num_labels)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    for _ in range(_STEPS):
        chosen = torch.randint(0, len(labels), (_BATCH_TOKENS,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(classifier(x[chosen]), labels[chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return classifier


def _to_markdown(accuracies: Mapping[str, float]) -> str:
    layers = sorted({path.split(".")[2] for path in accuracies})
    lines = [["layer", *_NAMES], ["---", *["---:"] * len(_NAMES)]]
    for layer in layers:
        of_layer = {
            path.rpartition(".")[2]: found for path, found in accuracies.items() if f".{layer}." in path
        }
        lines.append([layer, *(f"{100 * of_layer[name]:.0f} %" for name in _NAMES)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
