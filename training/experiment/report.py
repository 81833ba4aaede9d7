"""The experiment's tables, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean

from fusionserve.training.experiment.lab import MIXED
from fusionserve.training.experiment.results import Result, Spread, spread
from fusionserve.training.experiment.size_curve import NEW, SIZES
from fusionserve.training.experiment.systems import BASE, FUSION, SHIPPED, UNIFORM

MIXTURE = "mixture"

Runs = Mapping[str, Sequence[Result]]  # by system, a result for each seed
Curve = Mapping[str, Mapping[int, Sequence[Result]]]  # by way, then by number of examples


def by_system(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Groups results, in the order in which systems first appear."""
    runs: dict[str, list[Result]] = {}
    for result in results:
        runs.setdefault(result.system, []).append(result)
    return runs


def perplexities(result: Result, domains: Sequence[str]) -> dict[str, float]:
    """Perplexity of every text; that of the mixture is over the domains, each as heavy as the others."""
    losses = dict(result.losses) | {MIXTURE: mean(result.losses[domain] for domain in domains)}
    return {text: math.exp(loss) for text, loss in losses.items()}


def perplexity_table(runs: Runs, domains: Sequence[str]) -> str:
    """Held-out perplexity: a line for each system, mean and standard deviation over the seeds."""
    texts = [*domains, MIXTURE, *MIXED]
    lines = [["system", "seeds", "trained", "seconds", *texts], ["---", *["---:"] * (len(texts) + 3)]]
    for system, results in runs.items():
        found = [perplexities(result, domains) for result in results]
        cells = [str(spread([perplexity[text] for perplexity in found])) for text in texts]
        trained = f"{results[0].trained:,}" if results[0].trained else ""
        seconds = f"{mean(result.seconds for result in results):.0f}" if results[0].seconds else ""
        lines.append([system, str(len(results)), trained, seconds, *cells])
    return _to_markdown(lines)


def distance_table(runs: Runs, domains: Sequence[str]) -> str:
    """How far each system is above the best single adapter of each text, in per cent; negative is better."""
    texts = [*domains, MIXTURE, *MIXED]
    best = best_single(runs, domains)
    lines = [["system", *texts], ["---", *["---:"] * len(texts)]]
    for system, results in runs.items():
        found = [perplexities(result, domains) for result in results]
        mean_of = {text: mean(perplexity[text] for perplexity in found) for text in texts}
        lines.append([system, *(f"{100 * (mean_of[text] / best[text] - 1):+.1f} %" for text in texts)])
    return _to_markdown(lines)


def best_single(runs: Runs, domains: Sequence[str]) -> dict[str, float]:
    """The lowest perplexity that any one adapter reaches, by text."""
    singles = [perplexities(runs[domain][0], domains) for domain in domains]
    return {text: min(single[text] for single in singles) for text in singles[0]}


def weight_table(results: Sequence[Result], domains: Sequence[str]) -> str:
    """Mean weight of every member by text, over tokens, attentions and seeds."""
    lines = [["text", *domains], ["---", *["---:"] * len(domains)]]
    for text in (*domains, *MIXED):
        means = [mean(result.weights[text][member] for result in results) for member in domains]
        lines.append([text, *(f"{weight:.2f}" for weight in means)])
    return _to_markdown(lines)


def size_table(curve: Curve) -> str:
    """Perplexity of the new domain's held-out text by number of examples."""
    lines = [["way", *(f"{size} examples" for size in SIZES)], ["---", *["---:"] * len(SIZES)]]
    for way, by_size in curve.items():
        lines.append([way, *(str(size_spread(by_size[size])) for size in SIZES)])
    return _to_markdown(lines)


def size_spread(results: Sequence[Result]) -> Spread:
    """Of perplexity on the new domain."""
    return spread([math.exp(result.losses[NEW]) for result in results])


def to_report(runs: Runs, alone: Mapping[str, float], curve: Curve, domains: Sequence[str]) -> str:
    """All tables; `alone` is the new domain's perplexity of what has not learned from it, by system."""
    singles = ", ".join(f"{name} {alone[name]:.2f}" for name in domains)
    parts = [
        "## Held-out perplexity",
        perplexity_table(runs, domains),
        "## Distance to the best single adapter",
        distance_table(runs, domains),
        f"## Mean weights of the {SHIPPED}",
        weight_table(runs[SHIPPED], domains),
        f"## Mean weights of {FUSION}, over the seeds",
        weight_table(runs[FUSION], domains),
        "## A new domain",
        f"Without an example: base {alone[BASE]:.2f}, {UNIFORM} {alone[UNIFORM]:.2f}; adapters: {singles}.",
        size_table(curve),
    ]
    return "\n\n".join(parts) + "\n"


def _to_markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
