"""The benchmark of a GPU from end to end, on the CPU and with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusionserve.loadtest.bench.floor import MachineLimit
from fusionserve.loadtest.bench.protocol import Outcome
from fusionserve.loadtest.gpu.__main__ import main
from fusionserve.loadtest.gpu.churn import ChurnRound
from fusionserve.loadtest.gpu.engine_rounds import Round
from fusionserve.loadtest.gpu.report import BaseRound, GpuFigures, to_table
from fusionserve.loadtest.gpu.workload import GpuWorkload
from fusionserve.loadtest.latency import Spread

SMALL = {
    "device": "cpu",
    "shape": "tiny",
    "churn-shape": "tiny",
    "streams": 2,
    "prompt-tokens": 20,
    "new-tokens": 3,
    "long-prompt": 40,
    "adapters": 4,
    "churn-adapters": 6,
    "churn-clients": 2,
    "repeats": 1,
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_every_part_is_measured(tmp_path: Path) -> None:
    main([text for name, value in {**SMALL, "out": tmp_path}.items() for text in (f"--{name}", str(value))])
    found = json.loads((tmp_path / "gpu.json").read_text())
    cases = {
        "base, adapters unused",
        "one adapter",
        "4 adapters, r=16",
        "4 adapters, r=8 to 64",
        "fusion of 4",
    }
    bases = {"base", "base in int8", "base in int4"}
    assert found["step_s"].keys() == {*bases, *(f"{base}, one stream" for base in bases), *cases}
    assert found["long_prompt_s"].keys() == bases
    assert all(step_s > 0 for repeats in found["step_s"].values() for step_s in repeats)
    assert found["peers_round_s"].keys() == {"transformers", "PEFT"}
    lines = [line[0] for line in found["lines"]]
    assert cases <= set(lines) and "p99 gap of warm streams" in lines
    assert (tmp_path / "gpu.md").read_text().count("\n|") == len(lines) + 2


def one_round(step_s: float) -> Round:
    workload = GpuWorkload(shape="tiny")
    outcome = Outcome(1.0, 1.0 + step_s * (workload.new_tokens - 1), [])
    return Round(outcome, outcome, workload.new_tokens - 1)


def base_round(step_s: float) -> BaseRound:
    """One stream takes half as long for a step, and a prompt three times as long."""
    return BaseRound(all_streams=one_round(step_s), one_stream=one_round(step_s / 2), prompt_s=3 * step_s)


def test_shares_are_of_medians() -> None:
    workload = GpuWorkload(shape="tiny")
    spread = Spread.of([0.5, 0.5])
    figures = GpuFigures(
        workload,
        "a GPU",
        {"torch": "1"},
        MachineLimit(bytes_per_s=1e9, flops_per_s=1e15),
        base=[base_round(step_s) for step_s in (0.01, 0.02, 0.9)],
        few_bits={"int8": [base_round(0.016)]},
        cases={"one adapter": [one_round(0.025)]},
        peers_s={"transformers": [22.6]},
        churn=(ChurnRound(100.0, spread, spread, spread), ChurnRound(80.0, spread, spread, spread)),
    )
    table = to_table(figures, workload.cases())
    least_s = 2 * (workload.size.linear_params + workload.size.head_params) / 1e9
    assert (
        f"| base, decoding step | 20.00 ms | {(least_s + kv_s(workload)) / 0.02:.2f} of the floor |" in table
    )
    alone_s = least_s + kv_s(workload) / workload.num_streams
    assert f"| base, decoding step of one stream | 10.00 ms | {alone_s / 0.01:.2f} of the floor |" in table
    assert "| base in int8, decoding step | 16.00 ms | 1.25 x as fast |" in table
    assert "| base in int8, decoding step of one stream | 8.00 ms | 1.25 x as fast |" in table
    assert "| base in int8, prompt of 8192 tokens | 48.00 ms | 1.25 x as fast |" in table
    assert "| one adapter | 25.00 ms | 0.80 of base | 0.92 |" in table
    assert "| transformers, a round | 22600.00 ms | we: 10.0 x as fast | 4 |" in table
    assert "| all adapters, by Zipf's law | 80 tokens/s | 0.80 of those in the pool | 0.75 |" in table


def kv_s(workload: GpuWorkload) -> float:
    """To read the keys and values of an average step at 1 GB/s."""
    context = workload.prompt_tokens + workload.new_tokens / 2
    return workload.num_streams * context * workload.size.kv_bytes_per_token / 1e9
