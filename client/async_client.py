"""The asyncio client: the same calls as the synchronous one, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

import grpc
from grpc import aio

from fusionserve.client import channel, requests, responses
from fusionserve.client.artifacts import ADAPTERS, FUSIONS, ArtifactKind, ItemT
from fusionserve.client.authorized_channel import authorized
from fusionserve.client.errors import cancelled_error, to_client_error, typed_errors
from fusionserve.client.readiness_wait import ReadinessWait
from fusionserve.client.results import Generation, GenerationEvent, Model
from fusionserve.client.server_access import ServerAccess
from fusionserve.v1 import inference_pb2
from fusionserve.v1.adapter_pb2_grpc import AdapterServiceStub
from fusionserve.v1.inference_pb2_grpc import InferenceServiceStub

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")


class AsyncClient:
    """Talks to the server at `target`; every failed call raises a subclass of ClientError.

    `credentials` are TLS's (`grpc.ssl_channel_credentials`), `token` is a bearer token sent with every call; without
    TLS to this machine only (else ValueError), unless `allow_insecure`. `timeout_s` is the default for calls that bring
    none; None waits as long as it takes, while the server's machine answers. `max_attempts` above 1 retries generations
    of up to 8 MiB that were refused for load or found no server. Close the client, or use it in an
    `async with`, in the event loop that uses it.
    """

    def __init__(
        self,
        target: str = channel.DEFAULT_TARGET,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        allow_insecure: bool = False,
        timeout_s: float | None = None,
        max_attempts: int = 1,
    ) -> None:
        access = ServerAccess(token=token, credentials=credentials, allow_insecure=allow_insecure)
        self._channel = channel.connect(
            aio.insecure_channel, aio.secure_channel, target, access, max_attempts
        )
        self._timeout_s = timeout_s
        calls = authorized(self._channel, token)
        self._inference = InferenceServiceStub(calls)
        self.adapters = AsyncArtifacts(calls, ADAPTERS, timeout_s)
        self.fusions = AsyncArtifacts(calls, FUSIONS, timeout_s)

    async def generate(
        self,
        prompt: requests.Prompt,
        *,
        timeout_s: float | None = None,
        **options: Unpack[requests.GenerateOptions],
    ) -> Generation:
        """The whole result for a text, a sequence of token ids, or chat messages."""
        request = requests.to_generate_request(prompt, options)
        return responses.to_generation(
            await _call(self._inference.Generate, request, self._timeout(timeout_s))
        )

    def stream(
        self,
        prompt: requests.Prompt,
        *,
        timeout_s: float | None = None,
        **options: Unpack[requests.GenerateOptions],
    ) -> AsyncGenerationStream:
        """The events of a generation as they happen: GenerationStarted, GenerationChunks, Generation."""
        request = inference_pb2.StreamGenerateRequest(request=requests.to_generate_request(prompt, options))
        with typed_errors():
            call = self._inference.StreamGenerate(request, timeout=self._timeout(timeout_s))
        return AsyncGenerationStream(call)

    async def tokenize(
        self, text: str | requests.ChatMessages, *, add_special_tokens: bool = True
    ) -> tuple[int, ...]:
        """The token ids the model would see for a text or for chat messages."""
        request = requests.to_tokenize_request(text, add_special_tokens)
        return tuple((await _call(self._inference.Tokenize, request, self._timeout_s)).token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        request = inference_pb2.DetokenizeRequest(
            token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        return (await _call(self._inference.Detokenize, request, self._timeout_s)).text

    async def model(self) -> Model:
        """The base model and the server's limits."""
        return responses.to_model(
            await _call(self._inference.GetModel, inference_pb2.GetModelRequest(), self._timeout_s)
        )

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns once the server takes requests; raises UnavailableError if it does not in `timeout_s`, and why."""
        check: aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(channel.HEALTH_CHECK)
        wait = ReadinessWait(timeout_s)
        while (left_s := wait.left_s()) > 0:
            with wait.noting():
                if await _call(check, channel.HEALTH_REQUEST, left_s) == channel.HEALTH_SERVING:
                    return
            await asyncio.sleep(channel.POLL_INTERVAL_S)
        raise wait.error()

    async def close(self) -> None:
        """Closes the connection; running calls are cancelled."""
        await self._channel.close()

    def _timeout(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncGenerationStream:
    """An iterator over the events of one generation; closing or dropping it cancels the generation.

    So does cancelling who waits for an event, be it by `asyncio.wait_for`: to wait a while and go on, wait for a task
    of the next event (`asyncio.wait`), or shield it.
    """

    def __init__(
        self,
        call: aio.UnaryStreamCall[inference_pb2.StreamGenerateRequest, inference_pb2.StreamGenerateResponse],
    ) -> None:
        self._call = call
        self._is_closed = False

    def __aiter__(self) -> AsyncIterator[GenerationEvent]:
        return self

    async def __anext__(self) -> GenerationEvent:
        try:
            while not self._is_closed:
                message = await self._call.read()
                if not isinstance(message, inference_pb2.StreamGenerateResponse):
                    break  # the end of the stream
                if event := responses.to_event(message):
                    return event
        except grpc.RpcError as error:  # as typed_errors, which costs more for every token
            raise to_client_error(error) from error
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            if not self._is_closed:
                raise cancelled_error() from None
        raise StopAsyncIteration

    async def close(self) -> None:
        """Cancels the generation unless it has ended; the iteration ends."""
        self._is_closed = True
        self._call.cancel()

    aclose = close  # as contextlib.aclosing calls it

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        # The tasks of grpc.aio keep a call alive that nobody can read any more.
        self._call.cancel()


class AsyncArtifacts(Generic[ItemT]):
    """The life of adapters, or of fusions, on the server."""

    def __init__(self, channel: aio.Channel, kind: ArtifactKind[ItemT], timeout_s: float | None) -> None:
        self._service = AdapterServiceStub(channel)
        self._kind = kind
        self._timeout_s = timeout_s

    async def load(
        self, name: str, path: str | None = None, *, pin: bool = False, sha256: str | None = None
    ) -> ItemT:
        """Loads it from `path` under the server's folders for its kind; without a path, from its name.

        With `sha256` (hex) only if the weights file has it; else that raises DataLossError.
        """
        return await self._call("Load", name=name, path=path, pin=pin, sha256=sha256)

    async def reload(
        self, name: str, path: str | None = None, *, pin: bool | None = None, sha256: str | None = None
    ) -> ItemT:
        """Publishes a new version; requests that run finish on the old one.

        It is pinned if the old one was, unless `pin` says.
        """
        return await self._call("Load", name=name, path=path, pin=pin, sha256=sha256, replace=True)

    async def unload(self, name: str, *, force: bool = False) -> ItemT:
        """Withdraws it and waits for its requests; with `force` they end with AbortedError."""
        return await self._call("Unload", name=name, force=force)

    async def get(self, name: str) -> ItemT:
        """A snapshot of one, loaded or available on disk."""
        return await self._call("Get", name=name)

    async def list(self) -> AsyncIterator[ItemT]:
        """All by name, loaded or available on disk, fetched page by page."""
        request = self._kind.list_request()
        while True:
            page = await _call(self._kind.list_method(self._service), request, self._timeout_s)
            for item in self._kind.items(page):
                yield item
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def _call(self, verb: str, **fields: Any) -> ItemT:
        request = self._kind.request(verb, **fields)
        method = self._kind.method(self._service, verb)
        return self._kind.item(await _call(method, request, self._timeout_s))


async def _call(
    method: aio.UnaryUnaryMultiCallable[RequestT, ResponseT], request: RequestT, timeout_s: float | None
) -> ResponseT:
    with typed_errors():
        try:
            return await method(request, timeout=timeout_s)
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            raise cancelled_error() from None


def _is_cancelled() -> bool:
    """Whether it is the caller that is cancelled, and not its call alone."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
