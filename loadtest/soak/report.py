"""The outcome of a soak as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from fusionserve.loadtest.soak.record import SoakRecord
from fusionserve.loadtest.soak.samples import Sample, Samples
from fusionserve.loadtest.soak.verdict import ALLOWED_GROWTH, Check, after_warm_up, growth

Json = dict[str, Any]


def to_json(
    samples: Samples, before: Sample, at_rest: Sample, record: SoakRecord, checks: Sequence[Check]
) -> Json:
    """Everything that was counted and measured."""
    return {
        "seconds": samples.times_s[-1],
        "requests": dict(record.requests.most_common()),
        "compared_tokens": record.compared_tokens,
        "commands": dict(record.commands.most_common()),
        "visits": [asdict(visit) for visit in record.visits],
        "checks": [asdict(check) | {"is_kept": check.is_kept} for check in checks],
        "problems": record.texts,
        "before": dict(before),
        "at_rest": dict(at_rest),
        "times_s": samples.times_s,
        "samples": samples.columns,
    }


def to_text(
    samples: Samples, before: Sample, at_rest: Sample, record: SoakRecord, checks: Sequence[Check]
) -> str:
    """What was held, what happened, and what is not as it should be."""
    rows = [f"{'':16}{'before':>9}{'median':>9}{'largest':>9}{'at rest':>9}{'growth':>9}{'allowed':>9}"]
    for name in samples.columns:
        values = after_warm_up(samples, name)[1]
        numbers = (before[name], float(np.median(values)), float(values.max()), at_rest[name])
        rows.append(f"{name:16}" + "".join(f"{n:9.1f}" for n in numbers) + _growth(samples, name))
    rows += ["", "requests: " + _counted(record.requests), "commands: " + _counted(record.commands)]
    rows.append(f"{record.compared_tokens} tokens compared; {len(record.visits)} visits of hostile clients")
    rows += [f"problem: {text}" for text in record.texts[:20]]
    rows += [
        f"FAILED: {check.name}: {check.value:.1f}, allowed {check.limit:g}"
        for check in checks
        if not check.is_kept
    ]
    rows.append(f"{sum(check.is_kept for check in checks)} of {len(checks)} checks passed")
    return "\n".join(rows)


def _growth(samples: Samples, name: str) -> str:
    limit = ALLOWED_GROWTH.get(name)
    return "" if limit is None else f"{growth(samples, name):9.1f}{limit:9g}"


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda c: -c[1]))
