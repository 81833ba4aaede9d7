"""Runs this server and its peers side by side: `make bench`, or `make bench-peers` with the peers of `make peers`.

Per workload, all systems are up at once and take turns within each repeat, on the same files and prompts. The table has
medians over the repeats: generated tokens by the time of the whole round, our rate (in process) as a multiple of each
system's, the time until the last stream has its first token, the rest, the floor's time as a share of the measured one
(whole round, and decoding alone), and the share of first tokens that are those of transformers (base) or PEFT (mixed).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path

from fusionserve.loadtest.bench.bench_run import BenchRun, run_workload
from fusionserve.loadtest.bench.peers import DEFAULT_FOLDER
from fusionserve.loadtest.bench.protocol import KINDS
from fusionserve.loadtest.bench.report import to_json, to_text
from fusionserve.loadtest.bench.systems import SYSTEMS
from fusionserve.loadtest.bench.workloads import WORKLOADS

_LARGE = {"W6"}  # its model in all systems at once takes 20 GiB: to be asked for, with some of them


def main() -> None:
    """Measures workload by workload, prints each one's tables and writes all of it as JSON."""
    arguments = _parser().parse_args()
    run = _bench_run(arguments)
    reports = []
    for name in arguments.workloads:
        report = run_workload(run, WORKLOADS[name])
        print(f"\n{to_text(report)}", flush=True)
        reports.append(to_json(report))
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(reports, indent=1))
    print(f"written to {arguments.json}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = [name for name in WORKLOADS if name not in _LARGE]
    for option, known, default in (
        ("--workloads", WORKLOADS, usual),
        ("--systems", SYSTEMS, list(SYSTEMS)),
        ("--kinds", KINDS, list(KINDS)),
    ):
        parser.add_argument(
            option, nargs="+", choices=list(known), default=default, metavar="NAME", help=_listed(known)
        )
    parser.add_argument("--no-peers", action="store_true", help="without what `make peers` installs")
    parser.add_argument("--repeats", type=_positive, default=5, help="measured ones (default: 5)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every system")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="checkpoints and logs")
    parser.add_argument("--peers", type=Path, default=DEFAULT_FOLDER, help="where `make peers` installed")
    parser.add_argument("--json", type=Path, default=Path("build/bench/results.json"))
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return number


def _listed(names: Iterable[str]) -> str:
    return "of: " + "; ".join(names)


def _bench_run(arguments: argparse.Namespace) -> BenchRun:
    named = [SYSTEMS[name] for name in arguments.systems]
    return BenchRun(
        systems=[each for each in named if not (arguments.no_peers and each.environment_name)],
        kinds=arguments.kinds,
        repeats=arguments.repeats,
        num_threads=arguments.threads,
        folder=arguments.folder,
        peers=arguments.peers,
    )


if __name__ == "__main__":
    main()
