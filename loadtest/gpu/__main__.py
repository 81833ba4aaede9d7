"""Measures the GPU path: decoding steps beside the floor, adapters beside the base, few bits, many adapters, peers.

    python -P -m fusionserve.loadtest.gpu [--shape llama-3-8b] [--parts engine peers] [--out build/gpu]

Models and adapters are random ones of real shapes, made on the spot. Prints a table and writes it with every repeat to
the folder, after every figure what there is. Parts have processes of their own; none runs for longer than --minutes let
it. Exits with 1 if anything could not be measured: the table says what, and standard error why.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fusionserve import __version__
from fusionserve.loadtest.bench.protocol import own_standard_output
from fusionserve.loadtest.gpu.churn import ChurnWorkload
from fusionserve.loadtest.gpu.part_process import end_at
from fusionserve.loadtest.gpu.parts import PARTS, Job, measure_part
from fusionserve.loadtest.gpu.report import GpuFigures, to_table
from fusionserve.loadtest.gpu.run import GpuRun
from fusionserve.loadtest.gpu.workload import GpuWorkload
from fusionserve.loadtest.model_shapes import SHAPES


def main(arguments: list[str] | None = None) -> int:
    """Runs it all, and returns the exit status; with --part one part, whose figures it prints."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given)
    if options.part:
        end_at(options.end)
        measure_part(options.part, job_of(options), own_standard_output())
        return 0
    end_s = time.monotonic() + 60 * options.minutes
    figures = GpuFigures(job_of(options).workload, _versions())
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-m", "fusionserve.loadtest.gpu", *given, "--folder", folder]
        GpuRun(figures, command, options.out, end_s).measure(options.parts)
    print(to_table(figures))
    return 1 if figures.failures else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of `main`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3-8b")
    parser.add_argument("--churn-shape", choices=sorted(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cuda")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--long-prompt", type=int, default=8192)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--churn-adapters", type=int, default=1000)
    parser.add_argument("--churn-clients", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which what still runs is ended")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or "build/gpu"),
        help="default: $OUT or build/gpu",
    )
    for option, kind in (("--part", str), ("--end", float), ("--folder", Path)):
        parser.add_argument(option, type=kind, help=argparse.SUPPRESS)  # what a part's process is told
    return parser.parse_args(arguments)


def job_of(options: argparse.Namespace) -> Job:
    """What the options say to the parts."""
    workload = GpuWorkload(
        shape=options.shape,
        num_streams=options.streams,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        long_prompt=options.long_prompt,
        num_adapters=options.adapters,
        fusion_sizes=tuple(n for n in (4, 8) if n <= options.adapters),
    )
    churn = ChurnWorkload(
        shape=options.churn_shape,
        num_adapters=options.churn_adapters,
        num_in_pool=min(64, options.churn_adapters // 2),
        num_clients=options.churn_clients,
    )
    return Job(
        workload=workload,
        churn=churn,
        repeats=options.repeats,
        device=options.device,
        folder=options.folder,
    )


def _versions() -> dict[str, str]:
    names = ("torch", "triton", "transformers", "peft")
    return {"fusionserve": __version__, **{name: _version(name) for name in names}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # an engine that failed may have left threads that nobody ends
