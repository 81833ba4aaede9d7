"""200 adapters on a server with room for 64 of them in memory and for 16 in the pool: what does a cold one cost?

    python -P -m fusionserve.loadtest.many_adapters

Makes a random checkpoint of a real shape and the adapters, drops them from the page cache, and serves them. Then:

1. An open loop whose adapters are drawn by Zipf's law. Prints the p99 of the time to first token of requests that
   found their adapter in memory (warm) and of those it was read from disk for (cold), beside the time that reading
   such a file takes.
2. Streams on a few pinned adapters, in turn without and with a storm of other adapters being loaded. Prints the p99
   of the gaps between the tokens of those streams.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fusionserve.loadtest.command import write_files
from fusionserve.loadtest.generate_load import generate_load
from fusionserve.loadtest.latency import Latencies
from fusionserve.loadtest.load_report import to_report
from fusionserve.loadtest.load_storm import Storm, load_pinned, storm_of_loads
from fusionserve.loadtest.model_shapes import SHAPES, save_adapter, save_checkpoint
from fusionserve.loadtest.outcome import Outcome
from fusionserve.loadtest.request_record import RequestRecord
from fusionserve.loadtest.residency import COLD, WARM
from fusionserve.loadtest.serving import Flags, serving
from fusionserve.loadtest.text_report import to_text
from fusionserve.loadtest_config import LORA, LoadConfig, UniformLengths

POOL_ADAPTERS, HOST_ADAPTERS, PINNED_ADAPTERS = 16, 64, 4
READS = 20  # files whose reading is timed
ALLOWED_RATIO = 1.5  # what the project asks of itself, of both figures


def main() -> None:
    """Makes the files, serves them, measures, prints."""
    arguments = _parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = _make_files(Path(folder), arguments)
        read_s = _median_read_s(weights)
        with serving(_serve_flags(Path(folder), arguments, weights)) as (target, _):
            zipf = asyncio.run(generate_load(_zipf_config(target, arguments)))
            _print_cold_and_warm(zipf, read_s)
            calm, stormy, storm = asyncio.run(_measure_storm(target, arguments))
    _print_storm(calm, stormy, storm)
    if arguments.out is not None:
        write_files(zipf, to_report(zipf), arguments.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2.0, help="requests/s")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of the open loop")
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--storm-rate", type=float, default=5.0, help="adapters loaded per second")
    parser.add_argument("--storm-duration", type=float, default=8.0, help="seconds, in each of --repeats")
    parser.add_argument("--repeats", type=int, default=2, help="of a calm and a stormy stretch")
    parser.add_argument("--out", type=Path, help="folder for the open loop's report and plots")
    return parser


def _make_files(folder: Path, arguments: argparse.Namespace) -> list[Path]:
    """Writes the checkpoint and the adapters; returns the adapters' weight files, none of them in the page cache."""
    save_checkpoint(arguments.shape, folder / "base")
    for n in range(arguments.adapters):
        save_adapter(arguments.shape, folder / "adapters" / f"adapter{n:03}", rank=arguments.rank, seed=n)
    weights = sorted((folder / "adapters").glob("*/adapter_model.safetensors"))
    os.sync()
    for path in weights:
        _drop_from_page_cache(path)
    return weights


def _median_read_s(weights: Sequence[Path]) -> float:
    """The time to read an adapter's weights from disk, over some that the open loop asks for least."""
    seconds = []
    for path in weights[-READS:]:
        started_s = time.perf_counter()
        path.read_bytes()
        seconds.append(time.perf_counter() - started_s)
        _drop_from_page_cache(path)
    return statistics.median(seconds)


def _drop_from_page_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _serve_flags(folder: Path, arguments: argparse.Namespace, weights: Sequence[Path]) -> Flags:
    return {
        "--model": folder / "base",
        "--dtype": "bfloat16",
        "--adapter-dir": folder / "adapters",
        "--adapter-pool-ranks": POOL_ADAPTERS * arguments.rank,
        "--adapter-host-size": HOST_ADAPTERS * weights[0].stat().st_size,
        "--kv-cache-size": "256MiB",
        "--max-context-tokens": 2048,
    }


def _zipf_config(target: str, arguments: argparse.Namespace) -> LoadConfig:
    return LoadConfig(
        target=target,
        rate=arguments.rate,
        duration_s=arguments.duration,
        warm_up=4,
        mix={LORA: 1.0},
        zipf=arguments.zipf,
        prompt_lengths=UniformLengths(arguments.prompt_tokens, arguments.prompt_tokens),
        output_lengths=UniformLengths(arguments.output_tokens, arguments.output_tokens),
    )


async def _measure_storm(
    target: str, arguments: argparse.Namespace
) -> tuple[list[RequestRecord], list[RequestRecord], Storm]:
    """The requests of calm and of stormy stretches, and the storm."""
    pinned = tuple(f"adapter{n:03}" for n in range(PINNED_ADAPTERS))
    others = itertools.cycle(f"adapter{n:03}" for n in reversed(range(PINNED_ADAPTERS, arguments.adapters)))
    await load_pinned(target, pinned)
    background = replace(
        _zipf_config(target, arguments),
        rate=None,
        concurrency=PINNED_ADAPTERS,
        duration_s=arguments.storm_duration,
        adapters=pinned,
        zipf=0.0,
        output_lengths=UniformLengths(64, 64),
    )
    calm: list[RequestRecord] = []
    stormy: list[RequestRecord] = []
    storm = Storm()
    for seed in range(arguments.repeats):
        calm += (await generate_load(replace(background, seed=2 * seed))).counted
        async with storm_of_loads(target, others, arguments.storm_rate, storm):
            stormy += (await generate_load(replace(background, seed=2 * seed + 1))).counted
    return calm, stormy, storm


def _print_cold_and_warm(outcome: Outcome, read_s: float) -> None:
    print(to_text(outcome, to_report(outcome)))
    groups = {
        name: Latencies.of([each for each in outcome.counted if outcome.residencies[each.index] == name])
        for name in (COLD, WARM)
    }
    cold, warm = groups[COLD].ttft_s, groups[WARM].ttft_s
    if cold is None or warm is None:
        print("\nno request was cold, or none was warm")
        return
    allowed_s = ALLOWED_RATIO * warm.p99 + read_s
    print(
        f"\np99 TTFT: cold {cold.p99 * 1000:.0f} ms of {cold.count}, warm {warm.p99 * 1000:.0f} ms of {warm.count} "
        f"(p50 {cold.p50 * 1000:.0f} and {warm.p50 * 1000:.0f} ms); reading an adapter from disk "
        f"{read_s * 1000:.1f} ms\n"
        f"cold is {cold.p99 / allowed_s:.2f} of the {allowed_s * 1000:.0f} ms it may take "
        f"({ALLOWED_RATIO} x warm + the read)",
        flush=True,
    )


def _print_storm(calm: Sequence[RequestRecord], stormy: Sequence[RequestRecord], storm: Storm) -> None:
    without, during = Latencies.of(calm).itl_s, Latencies.of(stormy).itl_s
    if without is None or during is None:
        print("no stream had two tokens")
        return
    num_failed = sum(not record.is_ok for record in (*calm, *stormy))
    print(
        f"p99 ITL of {PINNED_ADAPTERS} streams: {without.p99 * 1000:.1f} ms calm, {during.p99 * 1000:.1f} ms "
        f"in a storm of {storm.num_loaded} loads, {during.p99 / without.p99:.2f} x (at most {ALLOWED_RATIO}); "
        f"p50 {without.p50 * 1000:.1f} and {during.p50 * 1000:.1f} ms\n"
        f"a load took {storm.median_s * 1000:.0f} ms (median); {storm.num_present} were there before, "
        f"{storm.num_refused} loads refused, {num_failed} requests failed"
    )


if __name__ == "__main__":
    main()
