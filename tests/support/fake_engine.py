"""An engine without a model: deterministic text, adapters in a dict, and ways to hang, fail and be slow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace as changed

from fusionserve.adapter_status import (
    AdapterState,
    AdapterStatus,
    FusionMemberStatus,
    FusionStatus,
    Residency,
)
from fusionserve.errors import (
    AlreadyExistsError,
    FusionServeError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from fusionserve.generation import (
    Adaptation,
    Candidate,
    ChatPrompt,
    FinishReason,
    FusionWeightDetail,
    FusionWeights,
    GenerateParams,
    GenerationChunk,
    GenerationEvent,
    GenerationFinished,
    GenerationStarted,
    ModuleFusionWeights,
    Prompt,
    ResolvedAdaptation,
    ResolvedFusion,
    ResolvedMember,
    TextPrompt,
    Timings,
    TokenFusionWeights,
    TokenLogprob,
    TokenLogprobs,
    TokenPrompt,
    Usage,
)
from fusionserve.model_info import ModelInfo

MODEL_NAME = "fake-model"
DEFAULT_MAX_NEW_TOKENS = 4
LOAD_TIME_S = 1_700_000_000.25


class FakeEngine:
    """An EngineFacade. Token ids are code points; the output counts up from the adaptation's kind.

    `error` is raised by the next call but a load, `load_error` by loads, `error_midway` after the first chunk.
    `gate`, if set, is awaited before every chunk. `params` keeps what generate was called with.
    """

    def __init__(self, adapters: tuple[str, ...] = ("alpha", "beta")) -> None:
        self.adapters = {name: _status(name) for name in adapters}
        self.fusions = {"mix": _fusion_status("mix", adapters)}
        self.params: list[GenerateParams] = []
        self.tenants: list[str] = []  # who tokenized and loaded
        self.error: BaseException | None = None
        self.error_midway: BaseException | None = None
        self.load_error: BaseException | None = None
        self.gate: asyncio.Event | None = None
        self.num_chunks = 0  # asked for so far
        self.num_open = 0
        self.num_closed = 0
        self.started = False
        self.closed = False
        self.drain_grace_s: float | None = None
        self.failed = asyncio.Event()
        self.start_delay_s = 0.0
        self._draining = asyncio.Event()

    async def start(self) -> None:
        await asyncio.sleep(self.start_delay_s)
        self._raise_error()
        self.started = True

    async def generate(self, params: GenerateParams) -> AsyncGenerator[GenerationEvent, None]:
        self.params.append(params)
        self.num_open += 1
        try:
            async for event in self._events(params):
                yield event
        finally:
            self.num_open -= 1
            self.num_closed += 1

    async def tokenize(self, prompt: Prompt, *, add_special_tokens: bool, tenant: str) -> tuple[int, ...]:
        self._raise_error()
        self.tenants.append(tenant)
        return ((0,) if add_special_tokens else ()) + _token_ids(prompt)

    async def detokenize(self, token_ids: tuple[int, ...], *, skip_special_tokens: bool, tenant: str) -> str:
        self._raise_error()
        self.tenants.append(tenant)
        return "".join(chr(token_id) for token_id in token_ids if token_id or not skip_special_tokens)

    def model_info(self) -> ModelInfo:
        self._raise_error()
        return ModelInfo(
            name=MODEL_NAME,
            architecture="FakeForCausalLM",
            dtype="float32",
            weight_bytes=5 << 30,
            max_context_tokens=512,
            vocab_size=256,
            has_tokenizer=True,
            has_chat_template=False,
            eos_token_ids=(0, 7),
            max_batch_tokens=128,
            max_batch_requests=8,
            adapter_pool_ranks=64,
            max_adapter_rank=32,
            adapter_host_bytes=1 << 33,
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
        self.tenants.append(tenant)
        if self.load_error is not None:
            raise self.load_error
        old = self.adapters.get(name)
        if old is not None and not replace:
            raise AlreadyExistsError(
                "the adapter is loaded", reason="ADAPTER_EXISTS", metadata={"adapter": name}
            )
        version = 1 if old is None else old.version + 1
        if pin is None:
            pin = old is not None and old.pinned
        self.adapters[name] = changed(_status(name), version=version, pinned=pin, digest=path or name)
        return self.adapters[name]

    async def unload_adapter(self, name: str, *, force: bool) -> AdapterStatus:
        status = await self.get_adapter(name)
        if status.active_requests and not force:
            raise PreconditionError("the adapter is in use", reason="ADAPTER_IN_USE")
        del self.adapters[name]
        return AdapterStatus(name=name, state=AdapterState.AVAILABLE, residency=Residency.DISK)

    async def get_adapter(self, name: str) -> AdapterStatus:
        self._raise_error()
        if name not in self.adapters:
            raise _not_found(name)
        return self.adapters[name]

    async def list_adapters(self) -> list[AdapterStatus]:
        self._raise_error()
        return [self.adapters[name] for name in sorted(self.adapters)]

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
        self.tenants.append(tenant)
        if self.load_error is not None:
            raise self.load_error
        old = self.fusions.get(name)
        if old is not None and not replace:
            raise AlreadyExistsError(
                "the fusion is loaded", reason="FUSION_EXISTS", metadata={"fusion": name}
            )
        version = 1 if old is None else old.version + 1
        if pin is None:
            pin = old is not None and old.pinned
        status = _fusion_status(name, tuple(self.adapters))
        self.fusions[name] = changed(status, version=version, pinned=pin, digest=path or name)
        return self.fusions[name]

    async def unload_fusion(self, name: str, *, force: bool) -> FusionStatus:
        status = await self.get_fusion(name)
        if status.active_requests and not force:
            raise PreconditionError("the fusion is in use", reason="FUSION_IN_USE")
        del self.fusions[name]
        return FusionStatus(name=name, state=AdapterState.AVAILABLE, residency=Residency.DISK)

    async def get_fusion(self, name: str) -> FusionStatus:
        self._raise_error()
        if name not in self.fusions:
            raise _not_found(name, "fusion")
        return self.fusions[name]

    async def list_fusions(self) -> list[FusionStatus]:
        self._raise_error()
        return [self.fusions[name] for name in sorted(self.fusions)]

    async def wait_failed(self) -> None:
        await self.failed.wait()

    async def drain(self, grace_s: float) -> None:
        self.drain_grace_s = grace_s
        try:
            async with asyncio.timeout(grace_s):
                while self.num_open:
                    await asyncio.sleep(0.005)
        except TimeoutError:
            self._draining.set()

    async def close(self) -> None:
        self.closed = True

    async def _events(self, params: GenerateParams) -> AsyncGenerator[GenerationEvent, None]:
        self._raise_error()
        adaptation = self._resolve(params.adaptation)
        prompt_tokens = len(_token_ids(params.prompt))
        yield GenerationStarted(
            request_id=params.request_id, usage=Usage(prompt_tokens=prompt_tokens), adaptation=adaptation
        )
        words = [f"{params.adaptation.kind}{number} " for number in range(_max_new_tokens(params))]
        for number, word in enumerate(words):
            if number and self.error_midway is not None:
                raise self.error_midway
            await self._wait_for_gate()
            self.num_chunks += 1
            yield GenerationChunk(
                candidate_index=0,
                text=word,
                token_ids=(number,),
                logprobs=_logprobs(params, number, word),
                fusion_weights=_token_weights(params, number),
            )
        yield _finished(params, words, prompt_tokens, adaptation)

    async def _wait_for_gate(self) -> None:
        await asyncio.sleep(0)
        if self.gate is None:
            return
        waits = [asyncio.ensure_future(event.wait()) for event in (self.gate, self._draining)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._draining.is_set():
            raise UnavailableError("the server is draining", reason="DRAINING")

    def _resolve(self, adaptation: Adaptation) -> ResolvedAdaptation:
        if adaptation.kind == "fusion":
            return self._resolve_fusion(adaptation)
        for term in adaptation.terms:
            if term.name not in self.adapters:
                raise _not_found(term.name)
        statuses = [self.adapters[term.name] for term in adaptation.terms]
        members = tuple(
            ResolvedMember(status.name, status.version, status.digest, term.scale)
            for status, term in zip(statuses, adaptation.terms, strict=True)
        )
        return ResolvedAdaptation(adaptation.kind, members)

    def _resolve_fusion(self, adaptation: Adaptation) -> ResolvedAdaptation:
        if adaptation.fusion not in self.fusions:
            raise _not_found(adaptation.fusion, "fusion")
        status = self.fusions[adaptation.fusion]
        members = tuple(
            ResolvedMember(
                member.name, 1, member.digest, float(member.name not in adaptation.excluded_members)
            )
            for member in status.members
        )
        fusion = ResolvedFusion(status.name, status.version, status.digest)
        return ResolvedAdaptation("fusion", members, fusion)

    def _raise_error(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error


def failing_loader(error: FusionServeError) -> Callable[..., FakeEngine]:
    """A `load_engine` whose model cannot be loaded."""

    def load(*_: object) -> FakeEngine:
        raise error

    return load


def _status(name: str) -> AdapterStatus:
    return AdapterStatus(
        name=name,
        version=1,
        digest=f"digest-of-{name}",
        state=AdapterState.READY,
        residency=Residency.HOST,
        max_rank=8,
        target_modules=("q_proj", "v_proj"),
        host_bytes=4096,
        load_time_s=LOAD_TIME_S,
    )


def _fusion_status(name: str, members: tuple[str, ...]) -> FusionStatus:
    return FusionStatus(
        name=name,
        version=1,
        digest=f"digest-of-{name}",
        state=AdapterState.READY,
        residency=Residency.DEVICE,
        members=tuple(FusionMemberStatus(name=member, digest=f"digest-of-{member}") for member in members),
        modules=("layers.0.q_proj", "layers.0.v_proj"),
        scope="layer",
        d_key=16,
        member_keys=True,
        value_kind="low_rank",
        temperature=0.5,
        base_member=True,
        pool_ranks=34,
        host_bytes=8192,
        load_time_s=LOAD_TIME_S,
    )


def _not_found(name: str, what: str = "adapter") -> NotFoundError:
    return NotFoundError(
        f"there is no such {what}",
        resource_type=what,
        resource_name=name,
        reason=f"{what.upper()}_NOT_FOUND",
    )


def _token_ids(prompt: Prompt) -> tuple[int, ...]:
    match prompt:
        case TextPrompt(text):
            return tuple(ord(character) for character in text)
        case TokenPrompt(token_ids):
            return token_ids
        case ChatPrompt(messages):
            return tuple(ord(character) for role, content in messages for character in role + content)


def _max_new_tokens(params: GenerateParams) -> int:
    return params.stopping.max_new_tokens or DEFAULT_MAX_NEW_TOKENS


def _logprobs(params: GenerateParams, token_id: int, text: str) -> tuple[TokenLogprobs, ...]:
    if params.output.logprobs is None:
        return ()
    top = tuple(
        TokenLogprob(index, f"t{index}", -1.0 - index, index + 1) for index in range(params.output.logprobs)
    )
    return (TokenLogprobs(TokenLogprob(token_id, text, -0.5, 1), top),)


def _finished(
    params: GenerateParams, words: list[str], prompt_tokens: int, adaptation: ResolvedAdaptation
) -> GenerationFinished:
    candidates = tuple(
        Candidate(
            index=index,
            text="".join(words),
            token_ids=tuple(range(len(words))),
            finish_reason=FinishReason.LENGTH,
            logprobs=tuple(
                entry for number, word in enumerate(words) for entry in _logprobs(params, number, word)
            ),
        )
        for index in range(params.num_candidates)
    )
    return GenerationFinished(
        request_id=params.request_id,
        candidates=candidates,
        usage=Usage(prompt_tokens=prompt_tokens, generated_tokens=len(words) * params.num_candidates),
        adaptation=adaptation,
        timings=Timings(queue_s=0.001, time_to_first_token_s=0.002, total_s=0.003),
        fusion_weights=_fusion_weights(params, adaptation),
    )


def _token_weights(params: GenerateParams, position: int) -> tuple[TokenFusionWeights, ...]:
    if params.output.fusion_weights is not FusionWeightDetail.PER_TOKEN:
        return ()
    return (TokenFusionWeights(position, (0.75, 0.25)),)


def _fusion_weights(params: GenerateParams, adaptation: ResolvedAdaptation) -> FusionWeights | None:
    detail = params.output.fusion_weights
    if detail is FusionWeightDetail.NONE:
        return None
    modules = (ModuleFusionWeights("layers.0.q_proj", (0.5, 0.5)),)
    return FusionWeights(
        members=tuple(member.name for member in adaptation.members),
        mean=(0.75, 0.25),
        tokens=_token_weights(params, 0),
        modules=modules if detail is FusionWeightDetail.PER_MODULE else (),
    )
