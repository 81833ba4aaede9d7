"""The files of a benchmark: one checkpoint per shape, its adapters and a fusion, made once and read by every system."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fusionserve.loadtest.bench.gguf_files import save_gguf_adapter, save_gguf_model
from fusionserve.loadtest.bench.workloads import FUSION_MEMBERS, BenchWorkload
from fusionserve.loadtest.model_shapes import FusionShape, save_adapter, save_checkpoint, save_fusion

_FUSION = FusionShape(scope="layer")


@dataclass(frozen=True, slots=True)
class BenchFiles:
    """Where they lie."""

    folder: Path
    num_adapters: int

    @property
    def model(self) -> Path:
        """The checkpoint in the form of transformers."""
        return self.folder / "base"

    @property
    def adapters(self) -> list[Path]:
        """The adapters in PEFT's form."""
        return [self.folder / "adapters" / f"adapter{n}" for n in range(self.num_adapters)]

    @property
    def fusion(self) -> Path:
        """A fusion of the first adapters."""
        return self.folder / "fusions" / f"of{FUSION_MEMBERS}"

    @property
    def gguf_adapters(self) -> list[Path]:
        """The adapters for llama.cpp."""
        return [self.folder / "gguf" / f"{path.name}.gguf" for path in self.adapters]

    def gguf_model(self, weight_type: str) -> Path:
        """The checkpoint for llama.cpp."""
        return self.folder / "gguf" / f"{weight_type}.gguf"

    def make(self, path: Path, save: Callable[[Path], None]) -> None:
        """Saves `path` unless it is there: elsewhere first, so that what is cut short is not taken for whole."""
        if path.exists():
            return
        unfinished = self.folder / "unfinished" / path.name
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        save(unfinished)
        unfinished.rename(path)


def make_files(workload: BenchWorkload, folder: Path) -> BenchFiles:
    """Makes what is missing under `folder`; everything is seeded, so what is there is what would be made."""
    name = f"{workload.shape}-{workload.num_adapters}x{workload.rank}"
    files = BenchFiles(folder.absolute() / name, workload.num_adapters)
    files.make(files.model, partial(save_checkpoint, workload.shape))
    for seed, adapter in enumerate(files.adapters):
        files.make(adapter, partial(save_adapter, workload.shape, rank=workload.rank, seed=seed))
    members = files.adapters[:FUSION_MEMBERS]
    files.make(files.fusion, lambda path: save_fusion(workload.shape, path, members, _FUSION, seed=0))
    return files


def make_gguf_files(files: BenchFiles, weight_type: str) -> None:
    """Makes what is missing for llama.cpp with matrices of `weight_type`."""
    files.make(files.gguf_model(weight_type), lambda path: save_gguf_model(files.model, path, weight_type))
    for adapter, converted in zip(files.adapters, files.gguf_adapters, strict=True):
        files.make(converted, partial(save_gguf_adapter, files.model, adapter))
