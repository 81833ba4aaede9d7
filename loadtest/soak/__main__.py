"""Serves the embedded model for minutes or hours, and lets everything loose on it at once.

    python -P -m fusionserve.loadtest.soak --minutes 60 --out build/soak

Honest clients send requests of every kind (base, LoRA, blend, fusion; greedy and seeded; streams and single answers,
some of them given up or with little time) and compare every token with what the request got alone at the start.
Meanwhile adapters and fusions are loaded, pinned, reloaded and unloaded, with and without force, in less room than they
need, and hostile clients of all kinds come and go (`fusionserve/loadtest/hostile/`). Every second it is noted what the
server holds. Fails (1) if something grew after the first third of the time, if something is not returned at the end, or
if a stream got other tokens, or an answer another status, than it may.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fusionserve.loadtest.hostile.kinds import KINDS
from fusionserve.loadtest.soak.files import copy_adapters
from fusionserve.loadtest.soak.plot import draw_soak
from fusionserve.loadtest.soak.report import to_json, to_text
from fusionserve.loadtest.soak.run import SoakPlan, soak
from fusionserve.loadtest.soak.verdict import judge


def main(argv: Sequence[str] | None = None) -> int:
    """Soaks, prints the table, writes JSON and picture; 1 if it did not pass."""
    arguments = _parser().parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    plan = SoakPlan(
        seconds=60 * arguments.minutes,
        num_clients=arguments.clients,
        num_requests=arguments.requests,
        kinds=tuple(KINDS if arguments.hostile is None else arguments.hostile),
        seed=arguments.seed,
        dtype=arguments.dtype,
    )
    with tempfile.TemporaryDirectory() as folder:
        adapters = copy_adapters(Path(folder))
        samples, before, at_rest, record = soak(plan, adapters, arguments.out / "server.log")
    checks = judge(samples, at_rest, record)
    report = to_json(samples, before, at_rest, record, checks)
    (arguments.out / "soak.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(to_text(samples, before, at_rest, record, checks))
    title = f"{arguments.minutes:g} minutes, {sum(record.requests.values()):,} requests"
    draw_soak(samples, record, title, arguments.out / "soak.png")
    print(f"written to {arguments.out}: soak.json, soak.png, server.log")
    return 0 if all(check.is_kept for check in checks) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=6, help="honest requests at once")
    parser.add_argument("--requests", type=int, default=80, help="distinct ones")
    parser.add_argument(
        "--hostile", nargs="*", choices=list(KINDS), help="kinds of clients; default: all, none: none"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--out", type=Path, default=Path("build/soak"), help="folder for what it writes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
