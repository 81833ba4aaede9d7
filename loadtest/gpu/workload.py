"""What is measured: streams on a model of a real shape, and what adapts them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fusionserve.config import EngineConfig
from fusionserve.generation import Adaptation, AdapterTerm
from fusionserve.loadtest.bench.floor import Load, ModelSize
from fusionserve.loadtest.bench.workloads import BenchWorkload, model_size
from fusionserve.loadtest.model_shapes import FusionShape, save_adapter, save_fusion

_MIXED_RANKS = (8, 16, 32, 64)
_FUSION = FusionShape(scope="layer")
_WRITERS = 8  # adapters made at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """How the streams are adapted, and which share of the base's speed is asked of it."""

    name: str
    adapters: Sequence[str] = ()  # stream n has the n-th, over and over
    fusion: str = ""
    aim: float | None = None

    def adaptation(self, stream: int) -> Adaptation:
        """Of a stream."""
        if self.fusion:
            return Adaptation("fusion", fusion=self.fusion)
        if self.adapters:
            return Adaptation("lora", terms=(AdapterTerm(self.adapters[stream % len(self.adapters)]),))
        return Adaptation()


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuWorkload:
    """Streams that start together, adapters of `rank` on all seven projections, and as many of several ranks."""

    shape: str
    num_streams: int = 64
    prompt_tokens: int = 512
    new_tokens: int = 64
    long_prompt: int = 8192
    num_adapters: int = 32
    num_peer_adapters: int = 8  # PEFT launches several kernels for each of them at each module
    rank: int = 16
    fusion_sizes: Sequence[int] = (4, 8)

    @property
    def size(self) -> ModelSize:
        """What decides how fast the model can be."""
        return model_size(self.shape)

    def load(self, num_streams: int | None = None) -> Load:
        """What a round of base requests must multiply and read, with all streams or with so many."""
        return Load(
            num_streams=num_streams or self.num_streams,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
        )

    def prompts(self, label: str) -> list[list[int]]:
        """One per stream, the same for the same label."""
        return self._as_bench(self.num_streams, self.prompt_tokens).prompts(label)

    def long_prompts(self, label: str) -> list[list[int]]:
        """One, for measuring how fast prompts are read."""
        return self._as_bench(1, self.long_prompt).prompts(label)

    def cases(self) -> list[Case]:
        """All but the base's own; the first are measured again once adapters lie in the pool."""
        equal, mixed = self._names([self.rank]), self._names(_MIXED_RANKS)
        least = dict(zip((4, 8), (0.78, 0.68), strict=True))
        few = (
            [self._equal_ranks(self.num_peer_adapters)] if self.num_peer_adapters < self.num_adapters else []
        )
        return [
            Case(name="base, adapters unused", aim=0.98),
            Case(name="one adapter", adapters=equal[:1], aim=0.92),
            *few,
            self._equal_ranks(self.num_adapters, aim=0.88),
            Case(name=f"{len(mixed)} adapters, r=8 to 64", adapters=mixed, aim=0.82),
            *(Case(name=f"fusion of {n}", fusion=f"of{n}", aim=least.get(n)) for n in self.fusion_sizes),
        ]

    def peer_cases(self) -> dict[str, Case]:
        """By peer, the case in which it is given the same work."""
        few = min(self.num_peer_adapters, self.num_adapters)
        return {"transformers": Case(name="base"), "PEFT": self._equal_ranks(few)}

    def make_files(self, folder: Path) -> None:
        """Writes adapters and fusions."""
        names = {*self._names([self.rank]), *self._names(_MIXED_RANKS)}
        with ThreadPoolExecutor(_WRITERS) as writers:
            list(writers.map(lambda name: self._save_adapter(folder, name), sorted(names)))
        members = [folder / "adapters" / name for name in self._names([self.rank])]
        for n in self.fusion_sizes:
            save_fusion(self.shape, folder / "fusions" / f"of{n}", members[:n], _FUSION, seed=n)

    def engine_config(self, folder: Path, device: str) -> EngineConfig:
        """Room for everything at once, so that no round waits for copies."""
        context = max(self.prompt_tokens + self.new_tokens, self.long_prompt) + 64
        tokens = self.num_streams * (self.prompt_tokens + self.new_tokens) + self.long_prompt
        return EngineConfig(
            model=self.shape,
            model_name=self.shape,
            device=device,
            dtype="bfloat16",
            adapter_dirs=(folder / "adapters",),
            fusion_dirs=(folder / "fusions",),
            max_context_tokens=context,
            max_batch_tokens=max(self.long_prompt, self.num_streams),
            min_prompt_tokens=self.long_prompt,
            max_batch_requests=self.num_streams,
            kv_cache_bytes=max(256 << 20, 2 * tokens * self.size.kv_bytes_per_token),
            adapter_pool_ranks=self._pool_ranks(),
            adapter_host_bytes=64 << 30,
            fusion_host_bytes=8 << 30,
            allow_base_mismatch=True,
        )

    def _pool_ranks(self) -> int:
        names = {*self._names([self.rank]), *self._names(_MIXED_RANKS)}
        fused = sum(n * (2 * self.rank + 1) for n in self.fusion_sizes)
        return sum(map(_rank_of, names)) + fused

    def _equal_ranks(self, num_adapters: int, aim: float | None = None) -> Case:
        adapters = self._names([self.rank])[:num_adapters]
        return Case(name=f"{num_adapters} adapters, r={self.rank}", adapters=adapters, aim=aim)

    def _names(self, ranks: Sequence[int]) -> list[str]:
        return [f"r{ranks[n % len(ranks)]}-{n}" for n in range(self.num_adapters)]

    def _save_adapter(self, folder: Path, name: str) -> None:
        seed = int(name.partition("-")[2])
        save_adapter(self.shape, folder / "adapters" / name, rank=_rank_of(name), seed=seed)

    def _as_bench(self, num_streams: int, prompt_tokens: int) -> BenchWorkload:
        return BenchWorkload(
            name=self.shape,
            shape=self.shape,
            num_streams=num_streams,
            prompt_tokens=prompt_tokens,
            new_tokens=self.new_tokens,
        )


def _rank_of(name: str) -> int:
    return int(name.partition("-")[0].removeprefix("r"))
