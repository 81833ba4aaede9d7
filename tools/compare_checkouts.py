"""Which of several checkouts is faster: their engines take turns, round by round, so that a machine's drift meets all.

    python -P tools/compare_checkouts.py ../before . --kinds base mixed --rounds 20

Each checkout has been set up (`make setup`). Prints seconds of prompts, of decoding and of whole rounds, and their
share of the first checkout's: the median of the rounds' own ratios, and the quartiles. A checkout beside its own copy
comes to 1.00 within 1 %.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from fusionserve.loadtest.bench.artifacts import make_files
from fusionserve.loadtest.bench.protocol import KINDS, Job, Outcome, Setup
from fusionserve.loadtest.bench.system_process import SystemProcess
from fusionserve.loadtest.bench.systems import OURS, SYSTEMS, make_setup
from fusionserve.loadtest.bench.workloads import WORKLOADS

_SYSTEM = SYSTEMS[OURS]
_FOLDER = Path("build/bench")
_NUM_WARM_ROUNDS = 2

Rounds = Sequence[Sequence[Outcome]]  # one outcome per checkout


def main() -> None:
    """Prints a line per kind and checkout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkouts", nargs="+", type=Path)
    parser.add_argument("--workload", choices=WORKLOADS, default="W1")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("quartiles need two rounds at least")
    workload = WORKLOADS[args.workload]
    setup = make_setup(_SYSTEM, workload, make_files(workload, _FOLDER), args.threads)
    with ExitStack() as running:
        processes = [running.enter_context(_started(checkout, setup)) for checkout in args.checkouts]
        for kind in args.kinds:
            jobs = [
                Job(kind, workload.prompts(f"{turn} {kind}"), workload.new_tokens)
                for turn in range(_NUM_WARM_ROUNDS + args.rounds)
            ]
            rounds = [_round(processes, job, backwards=turn % 2 > 0) for turn, job in enumerate(jobs)]
            _print_ratios(kind, args.checkouts, rounds[_NUM_WARM_ROUNDS:])


@contextmanager
def _started(checkout: Path, setup: Setup) -> Iterator[SystemProcess]:
    python = checkout.absolute() / ".venv" / "bin" / "python"
    variables = {"OMP_NUM_THREADS": str(setup.num_threads), **_SYSTEM.variables}
    with (
        tempfile.NamedTemporaryFile() as log,
        closing(SystemProcess(python, _SYSTEM.module, variables, Path(log.name))) as process,
    ):
        process.load(setup)
        yield process


def _round(processes: Sequence[SystemProcess], job: Job, *, backwards: bool) -> list[Outcome]:
    outcomes = [process.run(job) for process in (processes[::-1] if backwards else processes)]
    return outcomes[::-1] if backwards else outcomes


def _prompts_s(outcome: Outcome) -> float:
    assert outcome.prompt_s is not None
    return outcome.prompt_s


_SPANS: dict[str, Callable[[Outcome], float]] = {
    "prompts": _prompts_s,
    "decoding": lambda outcome: outcome.total_s - _prompts_s(outcome),
    "all": lambda outcome: outcome.total_s,
}


def _print_ratios(kind: str, checkouts: Sequence[Path], rounds: Rounds) -> None:
    for number, checkout in enumerate(checkouts):
        columns = []
        for name, span in _SPANS.items():
            seconds = statistics.median(span(outcomes[number]) for outcomes in rounds)
            low, median, high = statistics.quantiles(
                [span(outcomes[number]) / span(outcomes[0]) for outcomes in rounds], n=4
            )
            columns.append(f"{name} {seconds:.3f} s x {median:.3f} ({low:.3f}-{high:.3f})")
        print(f"{kind:6} {checkout}: " + "   ".join(columns), flush=True)


if __name__ == "__main__":
    main()
