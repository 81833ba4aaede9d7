"""Adapters and fusions that come and go: loads, reloads, pins and unloads, forced and not."""

from __future__ import annotations

import asyncio
import random

from fusionserve.client import AsyncClient, ClientError
from fusionserve.loadtest.soak.record import SoakRecord
from fusionserve.loadtest.soak.requests import ADAPTERS, COPIES, FUSION
from fusionserve.loadtest.soak.traffic import BAD_STATUS

_PAUSE_S = 0.4
_TIMEOUT_S = 60.0
_FUSION_SHARE = 0.25  # while it is loaded, its members cannot go
# Loaded already, not loaded, no room, a fusion holds it or the load met an unload.
_ALLOWED = {"OK", "ALREADY_EXISTS", "NOT_FOUND", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED"}
_COMMANDS = {"load": 4, "pin": 1, "reload": 3, "unload": 3, "unload by force": 2}


async def come_and_go(target: str, record: SoakRecord, draws: random.Random) -> None:
    """A command every now and then, until it is cancelled; those that wait go on beside the next ones."""
    async with AsyncClient(target, timeout_s=_TIMEOUT_S) as client, asyncio.TaskGroup() as group:
        while True:
            command = draws.choices(list(_COMMANDS), list(_COMMANDS.values()))[0]
            name = FUSION if draws.random() < _FUSION_SHARE else draws.choice((*ADAPTERS, *COPIES))
            group.create_task(_command(client, command, name, record))
            await asyncio.sleep(draws.uniform(0, 2 * _PAUSE_S))


async def unload_all(client: AsyncClient) -> None:
    """Unloads every fusion and adapter, pinned ones too."""
    for store in (client.fusions, client.adapters):
        for name in [item.name async for item in store.list()]:
            try:
                await store.unload(name, force=True)
            except ClientError as error:
                if error.status != "NOT_FOUND":
                    raise


async def _command(client: AsyncClient, command: str, name: str, record: SoakRecord) -> None:
    status = "OK"
    record.command_times_s.append(record.now_s)
    try:
        await _carry_out(client, command, name)
    except ClientError as error:
        status = error.status
        if status not in _ALLOWED:
            record.note_problem(BAD_STATUS, f"{command} {name}: {error}")
    record.commands[f"{command} {status}"] += 1


async def _carry_out(client: AsyncClient, command: str, name: str) -> None:
    store = client.fusions if name == FUSION else client.adapters
    match command:
        case "load":
            await store.load(name)
        case "pin":
            await store.load(name, pin=True)
        case "reload":
            await store.reload(name)
        case "unload":
            await store.unload(name)
        case "unload by force":
            await store.unload(name, force=True)
