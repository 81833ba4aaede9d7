"""One workload on several systems: start them all, let them take turns, measure the machine in between, end them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fusionserve.loadtest.bench.artifacts import BenchFiles, make_files
from fusionserve.loadtest.bench.floor import MachineLimit
from fusionserve.loadtest.bench.machine import measure_limit
from fusionserve.loadtest.bench.report import WorkloadReport
from fusionserve.loadtest.bench.system_process import SystemFailedError, SystemProcess
from fusionserve.loadtest.bench.systems import System, make_setup
from fusionserve.loadtest.bench.turns import Contestant, take_turns
from fusionserve.loadtest.bench.workloads import BenchWorkload


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRun:
    """Who takes part, how often, and where files, logs and the peers' environments lie."""

    systems: Sequence[System]
    kinds: Sequence[str]
    repeats: int
    num_threads: int
    folder: Path
    peers: Path


def run_workload(run: BenchRun, workload: BenchWorkload) -> WorkloadReport:
    """Measures; a system that cannot take part is in the report's failures, with the reason."""
    files = make_files(workload, run.folder)
    limits: list[MachineLimit] = []
    failures: dict[str, str] = {}
    with ExitStack() as running:
        processes = {}
        for system in run.systems:
            _tell(f"{workload.name}: starting {system.name}")
            try:
                processes[system] = running.enter_context(_started(run, system, workload, files))
            except SystemFailedError as error:
                failures[system.name] = str(error)
        contestants = {
            system.name: Contestant(process, tuple(kind for kind in system.kinds if kind in run.kinds))
            for system, process in processes.items()
        }

        def between(repeat: int) -> None:
            _tell(f"{workload.name}: " + (f"repeat {repeat} of {run.repeats}" if repeat else "warming up"))
            if repeat:
                limits.append(measure_limit(run.num_threads))

        rounds = take_turns(contestants, workload, run.repeats, between)
    return WorkloadReport(
        workload=workload,
        num_threads=run.num_threads,
        limits=limits,
        outcomes=rounds.outcomes,
        failures=failures | rounds.failures,
        versions={system.name: process.versions for system, process in processes.items()},
    )


@contextmanager
def _started(
    run: BenchRun, system: System, workload: BenchWorkload, files: BenchFiles
) -> Iterator[SystemProcess]:
    """The system with its model loaded."""
    setup = make_setup(system, workload, files, run.num_threads)
    log = run.folder / "logs" / f"{workload.name}-{system.name}.log"
    variables = {"OMP_NUM_THREADS": str(run.num_threads), **system.process_variables(run.peers)}
    with closing(SystemProcess(system.python(run.peers), system.module, variables, log)) as process:
        process.load(setup)
        yield process


def _tell(text: str) -> None:
    print(text, flush=True)
