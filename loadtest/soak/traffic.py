"""Honest clients of every habit, who compare each token with what the request gets alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from fusionserve.client import AsyncClient, ClientError, Generation, GenerationChunk
from fusionserve.loadtest.soak.record import SoakRecord
from fusionserve.loadtest.soak.requests import SoakRequest, Tokens

MISMATCH, BAD_STATUS = "mismatch", "status"
_TIMEOUT_S = 120.0
_PAUSE_S = 0.05
# Refused for load, and ended by somebody's forced unload.
_REFUSED, _UNLOADED, _LATE = "RESOURCE_EXHAUSTED", "ABORTED", "DEADLINE_EXCEEDED"


class Traffic:
    """Sends requests at random until it is cancelled; `references` are their tokens."""

    def __init__(
        self,
        client: AsyncClient,
        requests: Sequence[SoakRequest],
        references: Sequence[Tokens],
        record: SoakRecord,
    ) -> None:
        self._client = client
        self._requests = list(zip(requests, references, strict=True))
        self._record = record

    async def run(self, num_clients: int, draws: random.Random) -> None:
        """That many clients at once, each with a request at a time."""
        async with asyncio.TaskGroup() as group:
            for _ in range(num_clients):
                group.create_task(self._repeat(random.Random(draws.random())))

    async def _repeat(self, draws: random.Random) -> None:
        while True:
            request, reference = draws.choice(self._requests)
            habit = draws.choices(("stream", "unary", "cancel", "deadline"), (6, 2, 1, 1))[0]
            status = await self._send(habit, request, reference, draws)
            self._record.requests[f"{habit} {status}"] += 1
            allowed = {"OK", _REFUSED} | ({_UNLOADED} if request.is_adapted else set())
            if status not in allowed | ({_LATE} if habit == "deadline" else set()):
                self._record.note_problem(BAD_STATUS, f"{habit} of {request}: {status}")
            await asyncio.sleep(draws.uniform(0, 2 * _PAUSE_S))

    async def _send(self, habit: str, request: SoakRequest, reference: Tokens, draws: random.Random) -> str:
        """Sends the request and returns the status it ended with."""
        tokens: list[int] = []
        try:
            match habit:
                case "unary":
                    tokens += (await self._generate(request)).token_ids
                    self._compare(request, tuple(tokens), reference)
                case "cancel":
                    await self._stream(request, tokens, _TIMEOUT_S, draws.randint(0, len(reference)))
                case "deadline":
                    await self._stream(request, tokens, draws.choice((0.001, 0.02, 0.1, 0.3)), None)
                case _:
                    await self._stream(request, tokens, _TIMEOUT_S, None)
                    self._compare(request, tuple(tokens), reference)
        except ClientError as error:
            return error.status
        finally:
            self._compare(request, tuple(tokens), reference[: len(tokens)])
            self._record.compared_tokens += len(tokens)
        return "OK"

    async def _generate(self, request: SoakRequest) -> Generation:
        return await self._client.generate(request.prompt, timeout_s=_TIMEOUT_S, **request.options)

    async def _stream(
        self, request: SoakRequest, tokens: list[int], timeout_s: float, max_tokens: int | None
    ) -> None:
        """Adds what comes to `tokens`; gives up once there are `max_tokens`."""
        async with self._client.stream(request.prompt, timeout_s=timeout_s, **request.options) as events:
            async for event in events:
                if isinstance(event, GenerationChunk):
                    tokens += event.token_ids
                if max_tokens is not None and len(tokens) >= max_tokens:
                    return

    def _compare(self, request: SoakRequest, tokens: Tokens, reference: Tokens) -> None:
        if tokens != reference:
            self._record.note_problem(MISMATCH, f"{request}: {tokens} instead of {reference}")
