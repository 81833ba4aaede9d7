"""A whole run on a tiny model, with processes as in a real one."""

import json
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fusionserve.loadtest import model_shapes
from fusionserve.loadtest.bench import system_process, turns
from fusionserve.loadtest.bench.artifacts import make_files
from fusionserve.loadtest.bench.bench_run import BenchRun, run_workload
from fusionserve.loadtest.bench.floor import MachineLimit
from fusionserve.loadtest.bench.protocol import BASE, FUSION, KINDS, MIXED, SAMPLED, Outcome
from fusionserve.loadtest.bench.report import to_json, to_text
from fusionserve.loadtest.bench.system_process import SystemFailedError, SystemProcess, inherited_variables
from fusionserve.loadtest.bench.systems import OURS, OURS_WIRE, PEFT, SYSTEMS, TRANSFORMERS, VLLM, make_setup
from fusionserve.loadtest.bench.workloads import BenchWorkload

WORKLOAD = BenchWorkload(
    name="tiny", shape="tiny", num_streams=5, prompt_tokens=8, new_tokens=4, num_adapters=4, rank=2
)


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        vocab_size=40000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    monkeypatch.setitem(model_shapes.SHAPES, "tiny", config)


def started(name: str, folder: Path) -> SystemProcess:
    system = SYSTEMS[name]
    return SystemProcess(system.python(folder), system.module, {"OMP_NUM_THREADS": "1"}, folder / "log")


def test_errors_of_a_system_come_with_their_reason(tmp_path: Path) -> None:
    files = make_files(WORKLOAD, tmp_path)
    (files.model / "config.json").unlink()
    process = started(TRANSFORMERS, tmp_path)
    try:
        with pytest.raises(SystemFailedError, match="Error"):
            process.load(make_setup(SYSTEMS[TRANSFORMERS], WORKLOAD, files, 1))
    finally:
        process.close()


def test_a_process_that_ends_is_quoted(tmp_path: Path) -> None:
    process = SystemProcess(SYSTEMS[OURS].python(tmp_path), "no_such_module", {}, tmp_path / "log")
    setup = make_setup(SYSTEMS[TRANSFORMERS], WORKLOAD, make_files(WORKLOAD, tmp_path), 1)
    try:
        with pytest.raises(SystemFailedError, match=r"ended with status 1: .*No module named no_such_module"):
            process.load(setup)
    finally:
        process.close()


def test_a_system_without_an_answer_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "busy_driver.py").write_text(
        "import subprocess, sys\nsubprocess.Popen(['sleep', '60'])\nsys.stdin.read()\n"
    )
    monkeypatch.setattr(system_process, "_START_TIMEOUT_S", 2.0)
    variables = {"PYTHONPATH": str(tmp_path)}
    process = SystemProcess(SYSTEMS[OURS].python(tmp_path), "busy_driver", variables, tmp_path / "log")
    setup = make_setup(SYSTEMS[TRANSFORMERS], WORKLOAD, make_files(WORKLOAD, tmp_path), 1)
    try:
        family = [psutil.Process(process._process.pid)]
        while len(family) < 2:
            family = [family[0], *family[0].children()]
        with pytest.raises(SystemFailedError, match="no answer within 2 s"):
            process.load(setup)
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
    finally:
        process.close()


def test_how_openmp_waits_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that suits one system halves the speed of another."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("KEPT", "yes")
    assert inherited_variables().get("KEPT") == "yes" and "OMP_WAIT_POLICY" not in inherited_variables()


def test_files_that_are_there_are_not_made_again(tmp_path: Path) -> None:
    files = make_files(WORKLOAD, tmp_path)
    written = (files.model / "model.safetensors").stat().st_mtime_ns
    assert make_files(WORKLOAD, tmp_path) == files
    assert (files.model / "model.safetensors").stat().st_mtime_ns == written


def test_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fusionserve.loadtest.bench.bench_run.measure_limit", lambda _: MachineLimit(1e10, 1e11)
    )
    run = BenchRun(
        systems=[SYSTEMS[name] for name in (OURS, OURS_WIRE, TRANSFORMERS, PEFT, VLLM)],
        kinds=KINDS,
        repeats=2,
        num_threads=1,
        folder=tmp_path,
        peers=tmp_path / "peers",
    )
    monkeypatch.setattr(turns, "_PAUSE_S", 0.0)
    report = run_workload(run, WORKLOAD)
    assert report.failures == {VLLM: "not installed (make peers)"}
    ours = {(system, kind) for system in (OURS, OURS_WIRE) for kind in KINDS}
    assert set(report.outcomes) == ours | {(TRANSFORMERS, BASE), (TRANSFORMERS, SAMPLED), (PEFT, MIXED)}
    assert [len(each) for each in report.outcomes.values()] == [2] * 11
    for kind in KINDS:  # the front door adds nothing and loses nothing
        for in_process, wire in zip(
            report.outcomes[OURS, kind], report.outcomes[OURS_WIRE, kind], strict=True
        ):
            assert in_process.token_ids == wire.token_ids
    found = json.loads(json.dumps(to_json(report)))
    assert found["failures"] == report.failures
    assert {each["label"] for each in found["ratios"]} >= {"mixed / PEFT mixed", "gRPC / in process, base"}
    agreement = {(each["system"], each["kind"]): each["first_tokens_equal"] for each in found["systems"]}
    assert agreement[OURS, BASE] > 0.6
    assert agreement[OURS, MIXED] > 0.6
    assert agreement[OURS, FUSION] is None
    assert "left out: vllm: not installed (make peers)" in to_text(report)
    assert "transformers" in report.versions[TRANSFORMERS]
    assert_generated(report.outcomes[TRANSFORMERS, BASE], make_files(WORKLOAD, tmp_path).model)


def assert_generated(outcomes: list[Outcome], directory: Path) -> None:
    """The tokens of every repeat are those of `generate`."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    for repeat, outcome in enumerate(outcomes, start=1):
        assert outcome.prompt_s is not None
        assert 0 < outcome.prompt_s < outcome.total_s
        prompts = torch.tensor(WORKLOAD.prompts(f"{repeat} {BASE}"))
        tokens = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=WORKLOAD.new_tokens,
        )
        assert outcome.token_ids == tokens[:, WORKLOAD.prompt_tokens :].tolist()
