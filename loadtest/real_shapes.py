"""Serves a random model of a real shape and measures base and mixed batches through gRPC: tokens/s and memory.

    python -P -m fusionserve.loadtest.real_shapes --shape qwen2.5-0.5b

Prints, over several repeats, the median of generated tokens per second for base requests and for requests spread over
different adapters, their ratio, and the server's peak memory beside what it was given.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fusionserve.client import AsyncClient
from fusionserve.loadtest.model_shapes import SHAPES, save_adapter, save_checkpoint

_MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Concurrent streams of equal prompt and output length."""

    num_streams: int
    prompt_tokens: int
    new_tokens: int
    num_adapters: int


def main() -> None:
    """Makes the files, serves them, measures, prints."""
    arguments = _parser().parse_args()
    workload = Workload(
        num_streams=arguments.streams,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        num_adapters=arguments.adapters,
    )
    with tempfile.TemporaryDirectory() as folder:
        _make_files(arguments.shape, Path(folder), arguments)
        with _serving(Path(folder), arguments) as (target, process):
            _print_status_bytes("after load", process)
            rates = asyncio.run(_measure(target, workload, arguments.repeats))
            _print_rates(rates)
            _print_status_bytes("at the end", process)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kv-cache-mib", type=int, default=256)
    parser.add_argument("--adapter-host-mib", type=int, default=512)
    return parser


def _make_files(shape: str, folder: Path, arguments: argparse.Namespace) -> None:
    save_checkpoint(shape, folder / "base")
    for index in range(arguments.adapters):
        save_adapter(shape, folder / "adapters" / f"adapter{index}", rank=arguments.rank, seed=index)
    size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
    print(
        f"{shape}: {size / _MEBIBYTE:.0f} MiB on disk in bfloat16, served in {arguments.dtype}; "
        f"{arguments.adapters} adapters of r={arguments.rank}; {arguments.streams} streams, "
        f"{arguments.prompt_tokens} in, {arguments.new_tokens} out",
        flush=True,
    )


@contextmanager
def _serving(folder: Path, arguments: argparse.Namespace) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Runs the server on a free port until the block is left."""
    command = [str(Path(sys.executable).with_name("fusionserve")), "serve", "--listen", "127.0.0.1:0"]
    command += [
        "--metrics-listen",
        "off",
        "--model",
        str(folder / "base"),
        "--adapter-dir",
        str(folder / "adapters"),
    ]
    command += ["--kv-cache-size", f"{arguments.kv_cache_mib}MiB", "--max-context-tokens", "2048"]
    command += ["--dtype", arguments.dtype]
    command += ["--adapter-host-size", f"{arguments.adapter_host_mib}MiB"]
    command += ["--adapter-pool-ranks", str(arguments.adapters * arguments.rank)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready = process.stdout.readline().split()
        if not ready:
            raise SystemExit("the server did not start")
        yield ready[1].removeprefix("grpc="), process
    finally:
        process.terminate()
        process.wait(60)


async def _measure(target: str, workload: Workload, repeats: int) -> dict[str, list[float]]:
    """Generated tokens per second of each repeat, base and mixed in turn after one unmeasured round of each."""
    rates: dict[str, list[float]] = {"base": [], "mixed": []}
    async with AsyncClient(target) as client:
        for repeat in range(repeats + 1):
            for kind, measured in rates.items():
                rate = await _run_once(client, workload, kind, seed=repeat)
                if repeat:
                    measured.append(rate)
    return rates


async def _run_once(client: AsyncClient, workload: Workload, kind: str, *, seed: int) -> float:
    """One round of all streams at once; every prompt is new, so nothing comes from the prefix cache."""
    numbers = random.Random(f"{seed} {kind}")
    prompts = [
        [numbers.randrange(1000, 40000) for _ in range(workload.prompt_tokens)]
        for _ in range(workload.num_streams)
    ]
    started_s = time.monotonic()
    streams = [_drain(client, workload, kind, index, prompt) for index, prompt in enumerate(prompts)]
    num_tokens = sum(await asyncio.gather(*streams))
    return num_tokens / (time.monotonic() - started_s)


async def _drain(
    client: AsyncClient, workload: Workload, kind: str, index: int, prompt: Sequence[int]
) -> int:
    """Streams one request to its end; returns its generated tokens."""
    adapter = f"adapter{index % workload.num_adapters}" if kind == "mixed" else None
    num_tokens = 0
    async for event in client.stream(
        prompt, adapter=adapter, temperature=0.0, max_new_tokens=workload.new_tokens, ignore_eos=True
    ):
        num_tokens = getattr(getattr(event, "usage", None), "generated_tokens", 0)
    return num_tokens


def _print_rates(rates: dict[str, list[float]]) -> None:
    medians = {kind: statistics.median(measured) for kind, measured in rates.items()}
    for kind, measured in rates.items():
        print(
            f"{kind:6} {medians[kind]:7.1f} generated tokens/s  (repeats: {', '.join(f'{r:.1f}' for r in measured)})"
        )
    print(f"mixed / base = {medians['mixed'] / medians['base']:.2f}")


def _print_status_bytes(when: str, process: subprocess.Popen[str]) -> None:
    """Prints the server's memory from the kernel: resident now, and the peak."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    sizes = {
        key: int(rest.split()[0]) // 1024
        for key, _, rest in (line.partition(":") for line in lines)
        if "kB" in rest
    }
    print(f"memory {when}: resident {sizes['VmRSS']} MiB, peak {sizes['VmHWM']} MiB")


if __name__ == "__main__":
    main()
