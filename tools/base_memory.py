"""Serves a base as it is and in fewer bits, and prints what its weights take and what the server's process takes.

    python -P tools/base_memory.py                         the embedded base
    python -P tools/base_memory.py --shape qwen2.5-0.5b    random weights in the shape of a real model
    python -P tools/base_memory.py --model DIR

Weights: as the server reports them. Private: memory of the process alone once it is ready, with an 8 MiB KV cache, and
its peak until then. Mapped: pages of files, which the system drops when it needs the room. All in MiB.
"""

from __future__ import annotations

import argparse
import select
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from fusionserve.loadtest.model_shapes import SHAPES, save_checkpoint
from fusionserve.loadtest.serving import process_memory

_WAYS = tuple((bits, dtype) for bits in ("none", "int8", "int4", "nf4") for dtype in ("float32", "bfloat16"))
_SAMPLE_S = 0.01
_MEBIBYTE = 1 << 20
_SERVE = (str(Path(sys.executable).with_name("fusionserve")), "serve", "--listen", "127.0.0.1:0")
_LEAST = ("--metrics-listen", "127.0.0.1:0", "--kv-cache-size", "8MiB", "--max-context-tokens", "256")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--shape", choices=sorted(SHAPES))
    source.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model: Path | None = arguments.model
        if arguments.shape is not None:
            model = Path(folder) / arguments.shape
            save_checkpoint(arguments.shape, model)
        _print_table(model)


def _print_table(model: Path | None) -> None:
    _print_row("base", "--dtype", "weights", "private", "mapped", "private, peak")
    _print_row("---", "---", "---:", "---:", "---:", "---:")
    for quantize, dtype in _WAYS:
        sizes = _measure(model, quantize, dtype)
        _print_row(quantize, dtype, *(f"{size:,.1f}" for size in sizes))


def _print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def _measure(model: Path | None, quantize: str, dtype: str) -> tuple[float, ...]:
    """Weights, private, mapped and peak private memory of one server, in MiB."""
    options = ["--quantize", quantize, "--dtype", dtype]
    options += [] if model is None else ["--model", str(model)]
    process = subprocess.Popen((*_SERVE, *_LEAST, *options), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        peak = 0.0
        while not select.select((process.stdout,), (), (), _SAMPLE_S)[0]:
            peak = max(peak, process_memory(process.pid)["RssAnon"])
        ready = process.stdout.readline().split()
        if not ready:
            raise SystemExit("the server did not start")
        status = process_memory(process.pid)
        weights = _weight_bytes(ready[2].removeprefix("metrics="))
        return (weights / _MEBIBYTE, status["RssAnon"], status["RssFile"], max(peak, status["RssAnon"]))
    finally:
        process.terminate()
        process.wait(60)


def _weight_bytes(metrics_address: str) -> float:
    with urllib.request.urlopen(f"http://{metrics_address}/metrics", timeout=10) as response:
        lines: list[str] = response.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("fusionserve_base_weight_bytes "))


if __name__ == "__main__":
    main()
