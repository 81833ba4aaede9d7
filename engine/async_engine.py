"""The engine as the server sees it: coroutines on the event loop in front of the engine thread."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, contextmanager, suppress
from functools import cached_property
from itertools import count

from fusionserve.adapter_status import AdapterStatus, FusionStatus
from fusionserve.adapters.adapter import Adapter
from fusionserve.adapters.registry import AdapterRegistry
from fusionserve.adapters.resident import Resident
from fusionserve.adapters.store import AdapterStore
from fusionserve.config import EngineConfig
from fusionserve.daemon_thread import in_daemon_thread
from fusionserve.engine.adapter_loader import AdapterLoader
from fusionserve.engine.admission import Admission, shutting_down
from fusionserve.engine.base_model import BaseModel, dtype_name, load_base_model
from fusionserve.engine.engine import Output
from fusionserve.engine.engine_build import build_engine
from fusionserve.engine.engine_thread import EngineThread
from fusionserve.engine.fusion_metrics import FusionMetrics
from fusionserve.engine.generation_stream import GenerationStream
from fusionserve.engine.leased_adaptation import LeasedAdaptation
from fusionserve.engine.open_requests import OpenRequests, SharedRoom
from fusionserve.engine.pool_memory import PoolMemory
from fusionserve.engine.request import Generation
from fusionserve.engine.unadmitted import TimeLimitPassed
from fusionserve.engine.warm_up import WARM_UP
from fusionserve.errors import (
    AbortedError,
    FusionServeError,
    InvalidRequestError,
    StartupError,
    UnavailableError,
)
from fusionserve.fusion.fusion import Fusion
from fusionserve.fusion.loader import FusionPolicy
from fusionserve.fusion.registry import FusionRegistry
from fusionserve.fusion.store import FusionStore
from fusionserve.generation import GenerateParams, GenerationEvent, GenerationFinished, Prompt
from fusionserve.kernels.threads import compute_alone
from fusionserve.metrics import AdapterLabels, FusionLabels
from fusionserve.model_info import ModelInfo

_log = logging.getLogger(__name__)

_MAX_WAITING_CALLS = 64  # to tokenize, and to load
_LAST_WORDS_S = 1.0
_MAX_WORKERS = 16  # threads; on the disks of adapters and fusions six can hang


class AsyncEngine:
    """Generation and the life of adapters. Every method runs on one event loop, the one `start` was called on."""

    def __init__(self, config: EngineConfig, base: BaseModel, adapter_labels: AdapterLabels) -> None:
        self._config = config
        self._base = base
        self._adapter_labels = adapter_labels
        self._streams: dict[Generation, GenerationStream] = {}
        self._open = OpenRequests(config.max_open_requests, config.max_open_tokens)
        self._tokenizing = SharedRoom(_MAX_WAITING_CALLS, "calls", "TOKENIZER_BUSY")
        self._loading = SharedRoom(_MAX_WAITING_CALLS, "calls", "LOADER_BUSY")
        self._is_draining = self._is_closed = False
        self._failed = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._fusion_labels = FusionLabels(adapter_labels.limit)
        uids, loader = count(1), AdapterLoader(config, base)
        self._store = AdapterStore(
            AdapterRegistry(config.adapter_host_bytes, self._on_adapter_gone, uids),
            config.adapter_dirs,
            loader.load,
            lambda: self._fusions.holds(),
            lambda name, num_bytes: self._fusions.evict_idle(name, num_bytes),
            config.load_timeout_s,
        )
        self._fusions = FusionStore(
            FusionRegistry(config.fusion_host_bytes, self._on_fusion_gone, uids),
            config.fusion_dirs,
            self._store,
            base.modules,
            FusionPolicy(
                dtype=base.dtype,
                budget_bytes=config.fusion_host_bytes,
                max_rows=config.adapter_pool_ranks,
                allow_base_mismatch=config.allow_base_mismatch,
                pins_rows=base.device.type == "cuda",
            ),
            config.load_timeout_s,
        )
        self._admission = Admission(
            base.tokenizer,
            self._store,
            self._fusions,
            vocab_size=base.vocab_size,
            max_context_tokens=base.max_context_tokens,
            default_max_new_tokens=config.default_max_new_tokens,
            pool_ranks=config.adapter_pool_ranks,
        )
        self.engine, self._cache_memory = build_engine(
            config, base, self._release, adapter_labels, FusionMetrics(self._fusion_labels)
        )
        self._pool_memory = PoolMemory(config.adapter_dirs, loader)
        self._thread = EngineThread(self.engine, self._deliver_soon, self._die_soon)

    @classmethod
    def load(cls, config: EngineConfig, adapter_labels: AdapterLabels) -> AsyncEngine:
        """Loads the model and makes the caches; takes seconds and blocks. Raises StartupError."""
        return cls(config, load_base_model(config), adapter_labels)

    async def start(self) -> None:
        """Starts the engine thread, loads what is named at start and runs one request to warm up.

        Raises StartupError if an adapter or a fusion cannot be loaded.
        """
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(
            ThreadPoolExecutor(_MAX_WORKERS, thread_name_prefix="worker", initializer=compute_alone)
        )
        self._thread.start()
        for name, directory in self._config.adapters:
            with self._failing_start("adapter", name):
                await self._store.load_from(name, directory)
        for name, directory in self._config.fusions:
            with self._failing_start("fusion", name):
                await self._fusions.load_from(name, directory)
        await self._warm_up()
        self._pool_memory.get_soon()
        self._cache_memory.get_soon()
        self._watching = asyncio.create_task(self._watch())

    async def generate(self, params: GenerateParams) -> AsyncGenerator[GenerationEvent, None]:
        """Yields started, chunks and finished; closing the generator aborts the request. Raises FusionServeErrors."""
        self._refuse_unless_open(params)
        with self._open.opened(params), ExitStack() as held:
            try:
                generation = await self._admit(params, held)
            except TimeLimitPassed as ended:
                for told in ended.events:
                    yield told
                return
            stream = self._streams[generation] = GenerationStream(params.output.stream_interval)
            self._thread.post(lambda engine: engine.add(generation))
            try:
                async for event in stream.events():
                    yield event
            finally:
                del self._streams[generation]
                self._thread.post(lambda engine: engine.abort(generation))  # nothing to do if it has ended

    async def tokenize(
        self, prompt: Prompt, *, add_special_tokens: bool, tenant: str = ""
    ) -> tuple[int, ...]:
        """The ids of a text or a rendered chat. Raises PreconditionError without a tokenizer, CapacityError."""
        with self._tokenizing.taking(tenant, "", 1):
            return await self._admission.encode(prompt, add_special_tokens=add_special_tokens)

    async def detokenize(
        self, token_ids: tuple[int, ...], *, skip_special_tokens: bool, tenant: str = ""
    ) -> str:
        """The text of token ids.

        Raises PreconditionError without a tokenizer, InvalidRequestError for a bad id, CapacityError.
        """
        self._admission.check_token_ids(token_ids, "token_ids")
        with self._tokenizing.taking(tenant, "", 1):
            return await asyncio.to_thread(
                self._base.tokenizer.decode, token_ids, skip_special_tokens=skip_special_tokens
            )

    def model_info(self) -> ModelInfo:
        """The base model and the engine's limits."""
        return self._model_info

    @cached_property
    def _model_info(self) -> ModelInfo:
        """It stays the same, and counting the weights takes a look at each."""
        config, base = self._config, self._base
        return ModelInfo(
            name=config.model_name,
            architecture=type(base.model).__name__,
            dtype=dtype_name(base.dtype),
            quantization=base.quantization,
            weight_bytes=base.weight_bytes,
            max_context_tokens=base.max_context_tokens,
            vocab_size=base.vocab_size,
            has_tokenizer=base.tokenizer.is_present,
            has_chat_template=base.tokenizer.has_chat_template,
            eos_token_ids=tuple(sorted(base.eos_token_ids)),
            max_batch_tokens=config.max_batch_tokens,
            max_batch_requests=config.max_batch_requests,
            adapter_pool_ranks=config.adapter_pool_ranks,
            max_adapter_rank=config.max_adapter_rank,
            adapter_host_bytes=config.adapter_host_bytes,
        )

    async def load_adapter(
        self,
        name: str,
        path: str | None,
        *,
        pin: bool | None,
        replace: bool,
        digest: str | None = None,
        tenant: str = "",
    ) -> AdapterStatus:
        """Loads from under the adapter folders; returns when requests may use the adapter."""
        self._refuse_model_name(name, "adapter")
        with self._loading.taking(tenant, "", 1):
            await self._store.load(name, path, pin=pin, replace=replace, digest=digest)
        return await self.get_adapter(name)

    async def unload_adapter(self, name: str, *, force: bool) -> AdapterStatus:
        """Withdraws the name at once; returns when its requests have ended, which `force` makes them do."""
        return await self._store.unload(name, self._abort_users_of("adapter") if force else _leave_alone)

    async def get_adapter(self, name: str) -> AdapterStatus:
        """The adapter, loaded or on disk. Raises NotFoundError."""
        return await self._store.status(name, self.engine.scheduler.ledger.resident_uids)

    async def list_adapters(self) -> list[AdapterStatus]:
        """All adapters, loaded or on disk, by name."""
        return await self._store.statuses(self.engine.scheduler.ledger.resident_uids)

    async def load_fusion(
        self,
        name: str,
        path: str | None,
        *,
        pin: bool | None,
        replace: bool,
        digest: str | None = None,
        tenant: str = "",
    ) -> FusionStatus:
        """Loads from under the fusion folders, and the members with it; returns when requests may use the fusion."""
        self._refuse_model_name(name, "fusion")
        with self._loading.taking(tenant, "", 1):
            await self._fusions.load(name, path, pin=pin, replace=replace, digest=digest)
        return await self.get_fusion(name)

    async def unload_fusion(self, name: str, *, force: bool) -> FusionStatus:
        """Withdraws the name at once; returns when its requests have ended, which `force` makes them do."""
        return await self._fusions.unload(name, self._abort_users_of("fusion") if force else _leave_alone)

    async def get_fusion(self, name: str) -> FusionStatus:
        """The fusion, loaded or on disk. Raises NotFoundError."""
        return await self._fusions.status(name, self.engine.scheduler.ledger.resident_uids)

    async def list_fusions(self) -> list[FusionStatus]:
        """All fusions, loaded or on disk, by name."""
        return await self._fusions.statuses(self.engine.scheduler.ledger.resident_uids)

    async def wait_failed(self) -> None:
        """Returns when the engine thread has died or hangs, never otherwise."""
        await self._failed.wait()

    async def drain(self, grace_s: float) -> None:
        """Takes no more requests, waits for the running ones, and ends those left after `grace_s`."""
        self._is_draining = True
        try:
            await asyncio.wait_for(self._open.wait_idle(), grace_s)
        except TimeoutError:
            self._admission.end()
            self._thread.post(lambda engine: engine.abort_all(shutting_down()))
            with suppress(
                TimeoutError
            ):  # a client that does not read keeps its call open; the server ends that
                await asyncio.wait_for(self._open.wait_idle(), _LAST_WORDS_S)

    async def close(self) -> None:
        """Stops the engine thread; requests still open end with UnavailableError."""
        self._is_draining = True
        self._pool_memory.stop()
        self._cache_memory.stop()
        if self._watching is not None:
            self._watching.cancel()
        # Nobody watches any more: a step that hangs is left behind here.
        left_s = 0.0 if self._failed.is_set() else self._config.step_timeout_s - self._thread.busy_for_s()
        await in_daemon_thread("stop-engine", lambda: self._thread.stop(max(left_s, _LAST_WORDS_S)))
        self._is_closed = True
        self._end_streams(shutting_down())
        self._admission.close()
        await self._fusions.close(_LAST_WORDS_S)
        await self._store.close(_LAST_WORDS_S)

    async def _admit(self, params: GenerateParams, held: ExitStack) -> Generation:
        """Admits the request within its deadline; what it takes of the room for tokens is for `held` to give back."""

        def take_tokens(num_tokens: int) -> None:
            held.enter_context(self._open.holding_tokens(params, num_tokens))

        generation = await self._admission.admit(params, take_tokens)
        # Nobody may be left to run it or to end its stream.
        if self._failed.is_set() or self._is_closed or self._admission.has_ended:
            self._release(generation.adaptation)
            raise _engine_failed() if self._failed.is_set() else shutting_down()
        return generation

    def _refuse_unless_open(self, params: GenerateParams) -> None:
        if self._failed.is_set():
            raise _engine_failed()
        if self._is_draining:
            raise shutting_down()
        for term in params.adaptation.terms:
            self._refuse_model_name(term.name, "adapter")
        if params.adaptation.fusion is not None:
            self._refuse_model_name(params.adaptation.fusion, "fusion")

    @contextmanager
    def _failing_start(self, noun: str, name: str) -> Iterator[None]:
        try:
            self._refuse_model_name(name, noun)
            yield
        except FusionServeError as error:
            raise StartupError(f"{noun} {name}: {error.message}", reason=error.reason) from error

    def _refuse_model_name(self, name: str, noun: str) -> None:
        if name == self._config.model_name:
            raise InvalidRequestError(
                "this is the base model's name; leave the adaptation out to use the base",
                field=f"{noun}.name",
                reason=f"{noun.upper()}_ID_INVALID",
            )

    def _abort_users_of(self, noun: str) -> Callable[[Resident], None]:
        def abort(resident: Resident) -> None:
            error = AbortedError(
                f"{noun} {resident.name} was unloaded",
                reason=f"{noun.upper()}_UNLOADED",
                metadata={noun: resident.name},
            )
            self._thread.post(lambda engine: engine.abort_users(resident, error))

        return abort

    def _release(self, adaptation: LeasedAdaptation) -> None:
        """Ends the leases of a request; on any thread."""
        self._store.registry.release(adaptation.adapters)
        if adaptation.fusion is not None:
            self._fusions.registry.release((adaptation.fusion,))

    def _on_adapter_gone(self, adapter: Adapter) -> None:
        # Unloaded or evicted, not replaced. Its requests, which count under the label, have ended before.
        if self._store.registry.get(adapter.name) is None:
            self._adapter_labels.drop(adapter.name)
        self._thread.post(lambda engine: engine.forget(adapter.uid))

    def _on_fusion_gone(self, fusion: Fusion) -> None:
        if self._fusions.registry.get(fusion.name) is None:
            self._fusion_labels.drop(fusion.name)
        self._fusions.release_members(fusion)
        self._thread.post(lambda engine: engine.forget(fusion.uid))

    def _deliver_soon(self, outputs: list[Output]) -> None:
        self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            stream = self._streams.get(output.generation)
            if stream is not None:
                stream.push(output.event)

    def _die_soon(self) -> None:
        self._loop.call_soon_threadsafe(self._die)

    async def _watch(self) -> None:
        """Takes the engine for dead once a step or a command has taken longer than any may."""
        limit_s = self._config.step_timeout_s
        while self._thread.busy_for_s() < limit_s:
            await asyncio.sleep(min(1.0, limit_s / 4))
        _log.critical("the engine has been in one step for over %g s; every thread's stack follows", limit_s)
        faulthandler.dump_traceback()
        self._die()

    def _die(self) -> None:
        self._failed.set()
        self._end_streams(_engine_failed())

    def _end_streams(self, error: FusionServeError) -> None:
        for stream in self._streams.values():
            stream.push(error)

    async def _warm_up(self) -> None:
        async with aclosing(self.generate(WARM_UP)) as events:
            async for event in events:
                if isinstance(event, GenerationFinished):
                    return


def _engine_failed() -> UnavailableError:
    return UnavailableError("the engine has failed", reason="ENGINE_FAILED")


def _leave_alone(resident: Resident) -> None:
    """What an unload without force does to the requests of an adapter or a fusion."""
