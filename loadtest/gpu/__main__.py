"""Measures the GPU path: decoding steps beside the floor, adapters beside the base, few bits, peers, many adapters.

    python -P -m fusionserve.loadtest.gpu [--shape llama-3-8b] [--out build/gpu]

Models and adapters are random ones of real shapes, made on the spot. Prints a table and writes it with every repeat to
the folder, after every part what there is. What there is no time for within --minutes is left out, peers first.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from fusionserve import __version__
from fusionserve.engine.device import find_device
from fusionserve.loadtest.gpu.churn import ChurnWorkload, measure_churn
from fusionserve.loadtest.gpu.device_limit import measure_device_limit
from fusionserve.loadtest.gpu.engine_rounds import EngineRounds
from fusionserve.loadtest.gpu.peer_rounds import PeerRounds
from fusionserve.loadtest.gpu.report import BaseRound, GpuFigures, peers, to_table
from fusionserve.loadtest.gpu.workload import Case, GpuWorkload
from fusionserve.loadtest.model_shapes import SHAPES

BASE = Case(name="base")
FEW_BITS = ("int8", "int4")


def main(arguments: list[str] | None = None) -> None:
    """Runs it all."""
    options = _parser().parse_args(arguments)
    device = find_device(options.device)
    workload = _workload(options)
    figures = GpuFigures(workload, _device_name(device), _versions(), measure_device_limit(device))
    end_s = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as name:
        for measure in _parts(figures, Path(name), device, options):
            if time.monotonic() < end_s:
                measure()
                table = _write(figures, options.out)
    print(table)


def _parts(
    figures: GpuFigures, folder: Path, device: torch.device, options: argparse.Namespace
) -> Iterator[Callable[[], None]]:
    if device.type == "cuda":
        yield lambda: _measure_kernels(figures, device)
    yield lambda: _measure_engine(figures, folder, device, options)
    for quantize in FEW_BITS:
        yield partial(_measure_few_bits, figures, folder, device, quantize, options.repeats)
    yield lambda: _measure_churn(figures, folder / "churn", device, options)
    yield lambda: _measure_peers(figures, folder, device)


def _write(figures: GpuFigures, out: Path) -> str:
    """Writes what there is so far, and returns the table."""
    out.mkdir(parents=True, exist_ok=True)
    cases = figures.workload.cases()
    table = to_table(figures, cases)
    (out / "gpu.md").write_text(table + "\n")
    (out / "gpu.json").write_text(json.dumps(figures.to_json(cases), indent=1))
    return table


def _parser() -> argparse.ArgumentParser:
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
    parser.add_argument("--minutes", type=float, default=7.0, help="after which no other part is begun")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    return parser


def _workload(options: argparse.Namespace) -> GpuWorkload:
    return GpuWorkload(
        shape=options.shape,
        num_streams=options.streams,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        long_prompt=options.long_prompt,
        num_adapters=options.adapters,
        fusion_sizes=tuple(n for n in (4, 8) if n <= options.adapters),
    )


def _measure_kernels(figures: GpuFigures, device: torch.device) -> None:
    """Imports Triton, which trying the benchmark out on a CPU does without."""
    from fusionserve.loadtest.gpu.kernel_cases import KernelSizes
    from fusionserve.loadtest.gpu.kernel_times import measure_kernels

    figures.kernels = measure_kernels(KernelSizes(), figures.limit, device)
    _free(device)
    _say("kernels done")


def _measure_engine(
    figures: GpuFigures, folder: Path, device: torch.device, options: argparse.Namespace
) -> None:
    _say("making adapters")
    figures.workload.make_files(folder)
    _say("making the model")
    rounds = EngineRounds(figures.workload, folder, device)
    for repeat in range(-1, options.repeats):  # the first warms up
        base = _run_base(rounds, repeat)
        if repeat >= 0:
            figures.base.append(base)
    _say("base done")
    for case in figures.workload.cases():
        all_of = [rounds.run(case, f"{case.name} {repeat}") for repeat in range(-1, options.repeats)]
        figures.cases[case.name] = all_of[1:]
        _write(figures, options.out)
        _say(f"{case.name} done")
    rounds.close()
    del rounds
    _free(device)


def _run_base(rounds: EngineRounds, repeat: int) -> BaseRound:
    return BaseRound(
        all_streams=rounds.run(BASE, f"base {repeat}"),
        one_stream=rounds.run_alone(f"alone {repeat}"),
        prompt_s=rounds.read_prompt(f"long {repeat}"),
    )


def _measure_few_bits(
    figures: GpuFigures, folder: Path, device: torch.device, quantize: str, repeats: int
) -> None:
    rounds = EngineRounds(figures.workload, folder, device, quantize)
    figures.few_bits[quantize] = [_run_base(rounds, repeat) for repeat in range(-1, repeats)][1:]
    rounds.close()
    del rounds
    _free(device)
    _say(f"{quantize} done")


def _measure_churn(
    figures: GpuFigures, folder: Path, device: torch.device, options: argparse.Namespace
) -> None:
    _say("many adapters")
    workload = ChurnWorkload(
        shape=options.churn_shape,
        num_adapters=options.churn_adapters,
        num_in_pool=min(64, options.churn_adapters // 2),
        num_clients=options.churn_clients,
    )
    figures.churn = measure_churn(workload, folder, device)
    _free(device)


def _measure_peers(figures: GpuFigures, folder: Path, device: torch.device) -> None:
    workload = figures.workload
    cases = {case.name: case for case in workload.cases()}
    rounds = PeerRounds(workload.shape, device)
    for name, (ours, _) in peers(workload).items():
        if ours in cases:
            rounds.put_adapters_on([folder / "adapters" / each for each in cases[ours].adapters])
        rounds.run(workload.prompts("warm-up"), 4)
        figures.peers_s[name] = [rounds.run(workload.prompts(name), workload.new_tokens)]
        _say(f"{name} done")


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"


def _versions() -> dict[str, str]:
    names = ("torch", "triton", "transformers", "peft")
    return {"fusionserve": __version__, **{name: version(name) for name in names}}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
