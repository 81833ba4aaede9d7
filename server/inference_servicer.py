"""InferenceService: check, call the engine, translate."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from grpc import aio

from fusionserve.errors import DeadlineError, InternalError, InvalidRequestError
from fusionserve.generation import (
    GenerateParams,
    GenerationChunk,
    GenerationEvent,
    GenerationFinished,
    Prompt,
    TextPrompt,
)
from fusionserve.server import checks
from fusionserve.server.access import caller
from fusionserve.server.engine_facade import EngineFacade
from fusionserve.server.engine_gate import EngineGate
from fusionserve.server.generate_params import to_chat_prompt, to_generate_params
from fusionserve.server.generate_response import to_generate_response, to_stream_response
from fusionserve.server.model_message import to_get_model_response
from fusionserve.server.request_log import RequestLog
from fusionserve.server.request_outcome import RequestOutcome
from fusionserve.server.token_limits import TokenLimits
from fusionserve.v1 import inference_pb2 as pb
from fusionserve.v1 import inference_pb2_grpc

_LARGE_RESPONSE = 64  # tokens with log-probabilities or fusion weights

Event = TypeVar("Event", bound=GenerationEvent)
Message = TypeVar("Message")


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Generation for clients whose deadline, if they have one, may be cut to `max_request_s`.

    `limits` bounds what a token may have open; `shares_prefix_cache` lets tokens of other names find its prompts.
    """

    def __init__(
        self,
        gate: EngineGate,
        limits: TokenLimits,
        *,
        max_request_s: float,
        shares_prefix_cache: bool,
        log: RequestLog,
    ) -> None:
        self._gate = gate
        self._limits = limits
        self._max_request_s = max_request_s
        self._shares_prefix_cache = shares_prefix_cache
        self._log = log

    async def Generate(
        self,
        request: pb.GenerateRequest,
        context: aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse],
    ) -> pb.GenerateResponse:
        """The finished result."""
        with RequestOutcome(request, context, self._log) as outcome, self._limits.open_generation(caller()):
            engine = self._gate.admit()
            params = self._to_params(request, context)
            finished = await _result(engine, params)
            outcome.observe(finished)
            return await _built(to_generate_response, finished)

    async def StreamGenerate(
        self,
        request: pb.StreamGenerateRequest,
        context: aio.ServicerContext[pb.StreamGenerateRequest, pb.StreamGenerateResponse],
    ) -> AsyncGenerator[pb.StreamGenerateResponse, None]:
        """Started, chunks, finished; the engine's generator is closed however the stream ends."""
        generation = request.request
        with (
            RequestOutcome(generation, context, self._log) as outcome,
            self._limits.open_generation(caller()),
        ):
            engine = self._gate.admit()
            params = self._to_params(generation, context)
            async with aclosing(engine.generate(params)) as events:
                async for event in events:
                    outcome.observe(event)
                    yield await _built(to_stream_response, event)

    async def Tokenize(
        self,
        request: pb.TokenizeRequest,
        context: aio.ServicerContext[pb.TokenizeRequest, pb.TokenizeResponse],
    ) -> pb.TokenizeResponse:
        """Token ids of a text or a chat."""
        engine = self._gate.engine()
        adds_special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        token_ids = await engine.tokenize(
            _to_prompt(request), add_special_tokens=adds_special, tenant=caller().name
        )
        return pb.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(
        self,
        request: pb.DetokenizeRequest,
        context: aio.ServicerContext[pb.DetokenizeRequest, pb.DetokenizeResponse],
    ) -> pb.DetokenizeResponse:
        """Text of token ids."""
        engine = self._gate.engine()
        checks.check_count(
            "token_ids", request.token_ids, engine.model_info().max_context_tokens, "TOO_MANY_TOKENS"
        )
        skips_special = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        text = await engine.detokenize(
            tuple(request.token_ids), skip_special_tokens=skips_special, tenant=caller().name
        )
        return pb.DetokenizeResponse(text=text)

    async def GetModel(
        self,
        request: pb.GetModelRequest,
        context: aio.ServicerContext[pb.GetModelRequest, pb.GetModelResponse],
    ) -> pb.GetModelResponse:
        """The base model and the server's limits."""
        return to_get_model_response(self._gate.engine().model_info())

    def _to_params(
        self, request: pb.GenerateRequest, context: aio.ServicerContext[Any, Any]
    ) -> GenerateParams:
        """The request, checked, as its caller's. Raises InvalidRequestError, PermissionDeniedError, DeadlineError."""
        params = to_generate_params(request, self._deadline_s(context))
        caller().check_generation(params.adaptation, params.priority)
        tenant = caller().name
        return replace(params, tenant=tenant, cache_tenant="" if self._shares_prefix_cache else tenant)

    def _deadline_s(self, context: aio.ServicerContext[Any, Any]) -> float:
        remaining_s: float | None = context.time_remaining()
        if remaining_s is not None and remaining_s <= 0:
            raise DeadlineError("the deadline passed before the request was read")
        return time.monotonic() + min(math.inf if remaining_s is None else remaining_s, self._max_request_s)


async def _built(build: Callable[[Event], Message], event: Event) -> Message:
    """`build(event)`, on a worker thread if it is large, so that other streams go on meanwhile."""
    if _num_entries(event) > _LARGE_RESPONSE:
        return await asyncio.to_thread(build, event)
    return build(event)


def _num_entries(event: GenerationEvent) -> int:
    match event:
        case GenerationChunk():  # the first one of a fusion has the weights of all prompt tokens
            return len(event.logprobs) + len(event.fusion_weights)
        case GenerationFinished():
            weights = () if event.fusion_weights is None else event.fusion_weights.tokens
            return sum(len(c.logprobs) for c in event.candidates) + len(event.prompt_logprobs) + len(weights)
    return 0


async def _result(engine: EngineFacade, params: GenerateParams) -> GenerationFinished:
    last: GenerationEvent | None = None
    params = replace(params, output=replace(params.output, stream_interval=None))
    async with aclosing(engine.generate(params)) as events:
        async for event in events:
            last = event
    if not isinstance(last, GenerationFinished):
        raise InternalError("the engine ended a request without a result")
    return last


def _to_prompt(request: pb.TokenizeRequest) -> Prompt:
    match request.WhichOneof("input"):
        case "text":
            return TextPrompt(request.text)
        case "chat":
            return to_chat_prompt("chat", request.chat)
    raise InvalidRequestError("one of text and chat must be set", field="input", reason="PROMPT_REQUIRED")
