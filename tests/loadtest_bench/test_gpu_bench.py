"""The benchmark of a GPU on the CPU and with a tiny model: every part, its process, and what becomes of failures."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path

import pytest

from fusionserve.loadtest.gpu.__main__ import job_of, main, parse
from fusionserve.loadtest.gpu.engine_rounds import EngineRounds
from fusionserve.loadtest.gpu.figures import (
    ChurnFigure,
    DeviceFigure,
    Failure,
    KernelFigure,
    Sample,
    from_line,
    to_line,
)
from fusionserve.loadtest.gpu.part_process import PartProcess
from fusionserve.loadtest.gpu.parts import PARTS, measure_part
from fusionserve.loadtest.gpu.report import GpuFigures, to_table
from fusionserve.loadtest.gpu.workload import Case, GpuWorkload

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
CASES = {"base, adapters unused", "one adapter", "4 adapters, r=16", "4 adapters, r=8 to 64", "fusion of 4"}
ON_CPU = [name for name, part in PARTS.items() if not part.needs_gpu]


def small(**more: object) -> list[str]:
    """Arguments."""
    return [text for name, value in {**SMALL, **more}.items() for text in (f"--{name}", str(value))]


def measured(folder: Path, parts: list[str]) -> GpuFigures:
    """What these parts find, all in this process."""
    job = job_of(parse(small(folder=folder)))
    figures = GpuFigures(job.workload, {"torch": "1"})
    for name in parts:
        answers = io.StringIO()
        measure_part(name, job, answers)
        for line in answers.getvalue().splitlines():
            figures.add(from_line(line))
    return figures


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_every_part_is_measured(tmp_path: Path) -> None:
    figures = measured(tmp_path, ON_CPU)
    found = figures.to_json()
    bases = {"base", "base in int8", "base in int4"}
    assert found["failures"] == []
    assert found["step_s"].keys() == {*bases, *(f"{base}, one stream" for base in bases), *CASES}
    assert found["round_s"].keys() == found["step_s"].keys()
    assert found["long_prompt_s"].keys() == bases
    assert all(len(repeats) == 1 and repeats[0] > 0 for repeats in found["step_s"].values())
    assert found["peers_round_s"].keys() == {"transformers", "PEFT"}
    assert found["churn"].keys() == {"calm", "churning"}
    lines = [line[0] for line in found["lines"]]
    assert set(lines) >= {*CASES, "p99 gap of warm streams", "PEFT, a round"}
    assert to_table(figures).count("\n|") == len(lines) + 2


def test_a_failed_case_is_told_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = EngineRounds.run

    def run_but_one(rounds: EngineRounds, case: Case, label: str) -> object:
        if case.name == "one adapter":
            raise RuntimeError("no | such\n kernel")
        return run(rounds, case, label)

    monkeypatch.setattr(EngineRounds, "run", run_but_one)
    figures = measured(tmp_path, ["files", "engine"])
    assert figures.failures == [
        Failure(part="engine", case="one adapter", error="RuntimeError: no / such kernel")
    ]
    assert figures.samples["step_s"].keys() == {"base", "base, one stream", *CASES - {"one adapter"}}
    assert "in run_but_one" in capsys.readouterr().err
    row = "| failed: engine / one adapter |  | RuntimeError: no / such kernel |  |"
    assert row in to_table(figures)


def test_a_part_that_cannot_begin_is_told(tmp_path: Path) -> None:
    figures = measured(tmp_path, ["peers"])  # without the adapters' files
    (failure,) = figures.failures
    assert (failure.part, failure.case) == ("peers", "PEFT")
    assert figures.samples["peers_round_s"].keys() == {"transformers"}


def test_parts_have_processes_and_their_figures_are_written(tmp_path: Path) -> None:
    status = main([*small(out=tmp_path), "--parts", "attention", "int8"])
    assert status == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["device"]["type"] == "cpu" and found["failures"] == []
    assert found["step_s"].keys() == {"base in int8", "base in int8, one stream"}
    assert (tmp_path / "gpu.md").read_text().count("\n|") == len(found["lines"]) + 2


def test_what_there_is_no_time_for_is_told_and_fails_the_run(tmp_path: Path) -> None:
    assert main(small(out=tmp_path, minutes=0)) == 1
    (failure,) = json.loads((tmp_path / "gpu.json").read_text())["failures"]
    assert failure == {"part": "device", "case": "", "error": "left out, there was no time"}


def python(text: str, end_s: float) -> PartProcess:
    """A part whose process runs this and must end in so many seconds."""
    imports = (
        "import os, time",
        "from fusionserve.loadtest.gpu.part_process import end_at",
        "print('what a library says')",
        f"print({to_line(SAMPLE)!r}, flush=True)",
    )
    return PartProcess(
        "engine", [sys.executable, "-P", "-c", "\n".join((*imports, text))], time.monotonic() + end_s
    )


SAMPLE = Sample(what="step_s", case="base", seconds=0.5)


@pytest.mark.parametrize("text", ["os.abort()", "os._exit(7)", "end_at(time.monotonic()); time.sleep(60)"])
def test_figures_of_a_process_that_ends_early_are_kept_and_its_end_is_told(text: str) -> None:
    started_s = time.monotonic()
    sample, failure = python(text, 60).figures()
    assert sample == SAMPLE
    assert isinstance(failure, Failure) and (failure.part, failure.case) == ("engine", "")
    assert failure.error.startswith("its process ended with status ")
    assert time.monotonic() - started_s < 50


def test_a_process_that_does_not_end_itself_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    process = python("time.sleep(60)", -4.0)  # and five seconds on top
    assert "status -9" in str([*process.figures()][-1])


def test_a_process_that_ends_well_has_no_more_to_say() -> None:
    assert [*python("", 60).figures()] == [SAMPLE]


def test_figures_come_back_from_their_lines() -> None:
    kernel = KernelFigure(name="n", library="l", ours_s=1.0, library_s=None, num_bytes=1, flops=2)
    for figure in (SAMPLE, kernel, Failure(part="p", case="", error="e")):
        assert from_line(to_line(figure)) == figure


def samples(figures: GpuFigures, what: str, **seconds: list[float]) -> None:
    """Adds repeats, by case."""
    for case, repeats in seconds.items():
        for each in repeats:
            figures.add(Sample(what=what, case=case.replace("__", ", ").replace("_", " "), seconds=each))


def test_shares_are_of_medians() -> None:
    workload = GpuWorkload(shape="tiny")
    figures = GpuFigures(workload, {"torch": "1"})
    figures.add(DeviceFigure(type="cuda", name="a GPU", bytes_per_s=1e9, flops_per_s=1e15))
    samples(figures, "step_s", base=[0.01, 0.02, 0.9], base__one_stream=[0.005, 0.01, 0.45])
    samples(figures, "step_s", base_in_int8=[0.016], base_in_int8__one_stream=[0.008], one_adapter=[0.025])
    samples(figures, "long_prompt_s", base=[0.03, 0.06, 2.7], base_in_int8=[0.048])
    samples(figures, "round_s", base=[1.0, 2.26, 9.0])
    samples(figures, "peers_round_s", transformers=[22.6])
    for name, rate in (("calm", 100.0), ("churning", 80.0)):
        times = {"warm_ttft_s": 0.5, "cold_ttft_s": 0.5, "warm_itl_s": 0.5}
        figures.add(ChurnFigure(round=name, tokens_per_s=rate, **times))
    table = to_table(figures)
    assert table.startswith("a GPU: copies 1 GB/s, multiplies 1000.0 TFLOP/s; torch 1\n")
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
    assert "| transformers, a round | 22600.00 ms | we, base: 10.0 x as fast | 4 |" in table
    assert "| all adapters, by Zipf's law | 80 tokens/s | 0.80 of those in the pool | 0.75 |" in table


def test_a_table_has_what_there_is_without_the_base() -> None:
    figures = GpuFigures(GpuWorkload(shape="tiny"), {})
    samples(figures, "step_s", one_adapter=[0.025], base_in_int4=[0.016])
    assert [line[:3] for line in figures.lines()] == [
        ("one adapter", "25.00 ms", ""),
        ("base in int4, decoding step", "16.00 ms", ""),
    ]


def test_peers_are_given_the_adapters_of_a_case_that_is_measured() -> None:
    workload = GpuWorkload(shape="tiny")
    peft = workload.peer_cases()["PEFT"]
    assert peft.name == "8 adapters, r=16" and len(peft.adapters) == 8
    assert [case.adapters for case in workload.cases() if case.name == peft.name] == [peft.adapters]


def kv_s(workload: GpuWorkload) -> float:
    """To read the keys and values of an average step at 1 GB/s."""
    context = workload.prompt_tokens + workload.new_tokens / 2
    return workload.num_streams * context * workload.size.kv_bytes_per_token / 1e9
