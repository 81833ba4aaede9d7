"""What a fusion costs through gRPC: generated tokens/s of base, plain LoRA and fusion rounds, as ratios.

    python -P -m fusionserve.loadtest.fusion_cost --shape smollm2-135m

Serves a random model of a real shape in bfloat16. The kinds take turns within a run: all streams on the base, each on
one of the adapters, all on a fusion of 4 members, all on one of 8. `prompt` is the time until the last stream has its
first token, `decode` the rest of the round. Every figure is a median over the repeats; a ratio is the median of the
ratios within one repeat.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fusionserve.client import AsyncClient, GenerateOptions
from fusionserve.loadtest.model_shapes import SHAPES, FusionShape, save_adapter, save_checkpoint, save_fusion
from fusionserve.loadtest.rounds import Round, Workload, measure_rounds, median_ratio
from fusionserve.loadtest.serving import Flags, serving


def main() -> None:
    """Makes the files, serves them, measures, prints."""
    arguments = _parser().parse_args()
    workload = Workload(
        num_streams=arguments.streams,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.output_tokens,
    )
    with tempfile.TemporaryDirectory() as folder:
        _make_files(Path(folder), arguments)
        with serving(_serve_flags(Path(folder), arguments)) as (target, _):
            rounds = asyncio.run(_measure(target, workload, _kinds(arguments), arguments.repeats))
    print(
        f"{arguments.shape}, bfloat16: {workload.num_streams} streams, {workload.prompt_tokens} in, "
        f"{workload.new_tokens} out; {arguments.adapters} adapters of r={arguments.rank}; fusions of scope "
        f"{arguments.scope}, d_key {arguments.d_key}; medians of {arguments.repeats} repeats"
    )
    _print_table(rounds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=8, help="that plain LoRA streams are spread over")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--members", type=_numbers, default=[4, 8], help="sizes of the fusions: 4,8")
    parser.add_argument("--scope", choices=("layer", "module"), default="layer")
    parser.add_argument("--d-key", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    return parser


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _make_files(folder: Path, arguments: argparse.Namespace) -> None:
    save_checkpoint(arguments.shape, folder / "base")
    adapters = [
        folder / "adapters" / f"adapter{n}" for n in range(max(arguments.adapters, *arguments.members))
    ]
    for seed, adapter in enumerate(adapters):
        save_adapter(arguments.shape, adapter, rank=arguments.rank, seed=seed)
    fusion = FusionShape(scope=arguments.scope, d_key=arguments.d_key)
    for size in arguments.members:
        save_fusion(arguments.shape, folder / "fusions" / f"of{size}", adapters[:size], fusion, seed=size)


def _serve_flags(folder: Path, arguments: argparse.Namespace) -> Flags:
    """A pool with room for every resident at once, so that no round waits for copies into it."""
    fusion_rows = sum(2 * size * arguments.rank + size for size in arguments.members)
    return {
        "--model": folder / "base",
        "--dtype": "bfloat16",
        "--adapter-dir": folder / "adapters",
        "--fusion-dir": folder / "fusions",
        "--allow-base-mismatch": "on",
        "--adapter-pool-ranks": arguments.adapters * arguments.rank + fusion_rows,
        "--fusion-host-size": "1GiB",
        "--kv-cache-size": "256MiB",
        "--max-context-tokens": 2048,
    }


def _kinds(arguments: argparse.Namespace) -> dict[str, Sequence[GenerateOptions]]:
    """The adaptations that a kind's streams take in turn."""
    return {
        "base": [{}],
        "LoRA": [{"adapter": f"adapter{n}"} for n in range(arguments.adapters)],
        **{f"fusion of {size}": [{"fusion": f"of{size}"}] for size in arguments.members},
    }


async def _measure(
    target: str, workload: Workload, kinds: Mapping[str, Sequence[GenerateOptions]], repeats: int
) -> dict[str, list[Round]]:
    async with AsyncClient(target) as client:
        return await measure_rounds(client, workload, kinds, repeats)


def _print_table(rounds: Mapping[str, Sequence[Round]]) -> None:
    print(f"{'':12} {'tokens/s':>9} {'of base':>8} {'of LoRA':>8} {'prompt s':>9} {'decode s':>9}   repeats")
    for kind, measured in rounds.items():
        rates = [each.tokens_per_s for each in measured]
        print(
            f"{kind:12} {statistics.median(rates):9.1f} {median_ratio(measured, rounds['base']):8.2f} "
            f"{median_ratio(measured, rounds['LoRA']):8.2f} {_median(measured, lambda each: each.prompt_s):9.2f} "
            f"{_median(measured, lambda each: each.decode_s):9.2f}   {', '.join(f'{r:.0f}' for r in rates)}"
        )


def _median(rounds: Sequence[Round], figure: Callable[[Round], float]) -> float:
    return statistics.median(figure(each) for each in rounds)


if __name__ == "__main__":
    main()
