"""Serves a random model of a real shape and measures base and mixed batches through gRPC: tokens/s and memory.

    python -P -m fusionserve.loadtest.real_shapes --shape qwen2.5-0.5b

Prints, over several repeats, the median of generated tokens per second for base requests and for requests spread over
different adapters, the median of their ratios within one repeat, and the server's peak memory beside what it was given.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fusionserve.client import AsyncClient, GenerateOptions
from fusionserve.loadtest.model_shapes import SHAPES, save_adapter, save_checkpoint
from fusionserve.loadtest.rounds import Round, Workload, measure_rounds, median_ratio
from fusionserve.loadtest.serving import Flags, process_memory, serving

_MEBIBYTE = 1 << 20


def main() -> None:
    """Makes the files, serves them, measures, prints."""
    arguments = _parser().parse_args()
    workload = Workload(
        num_streams=arguments.streams,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
    )
    with tempfile.TemporaryDirectory() as folder:
        _make_files(arguments.shape, Path(folder), arguments)
        with serving(_serve_flags(Path(folder), arguments)) as (target, process):
            _print_status_bytes("after load", process)
            rounds = asyncio.run(_measure(target, workload, arguments.adapters, arguments.repeats))
            print("\n".join(to_lines(rounds)))
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


def _serve_flags(folder: Path, arguments: argparse.Namespace) -> Flags:
    return {
        "--model": folder / "base",
        "--adapter-dir": folder / "adapters",
        "--kv-cache-size": f"{arguments.kv_cache_mib}MiB",
        "--max-context-tokens": 2048,
        "--dtype": arguments.dtype,
        "--adapter-host-size": f"{arguments.adapter_host_mib}MiB",
        "--adapter-pool-ranks": arguments.adapters * arguments.rank,
    }


async def _measure(
    target: str, workload: Workload, num_adapters: int, repeats: int
) -> dict[str, list[Round]]:
    mixed: list[GenerateOptions] = [{"adapter": f"adapter{index}"} for index in range(num_adapters)]
    async with AsyncClient(target) as client:
        return await measure_rounds(client, workload, {"base": [{}], "mixed": mixed}, repeats)


def to_lines(rounds: Mapping[str, Sequence[Round]]) -> Iterator[str]:
    """The rates of the kinds, and how much of the base's is left to the mixed one."""
    for kind, measured in rounds.items():
        rates = [each.tokens_per_s for each in measured]
        repeats = ", ".join(f"{rate:.1f}" for rate in rates)
        yield f"{kind:6} {statistics.median(rates):7.1f} generated tokens/s  (repeats: {repeats})"
    yield f"mixed / base = {median_ratio(rounds['mixed'], rounds['base']):.2f}"


def _print_status_bytes(when: str, process: subprocess.Popen[str]) -> None:
    """Prints the server's memory from the kernel: resident now, and the peak."""
    sizes = process_memory(process.pid)
    print(f"memory {when}: resident {sizes['VmRSS']:.0f} MiB, peak {sizes['VmHWM']:.0f} MiB")


if __name__ == "__main__":
    main()
