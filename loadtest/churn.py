"""Traffic that never lets a server of the embedded model rest: streams of every kind while artifacts come and go."""

from __future__ import annotations

import random
import threading
from contextlib import suppress
from types import TracebackType
from typing import Any

from fusionserve.client import Client, ClientError

ADAPTERS = ("changelog", "cpp", "perl", "polish", "spanish")
FUSION = "domains"
_NUM_STREAMS = 3


class Churn:
    """Runs from entering its block to leaving it; what goes wrong is the server's affair, so errors are passed over."""

    def __init__(self, address: str, seed: int) -> None:
        self._address = address
        self._is_over = threading.Event()
        draws = random.Random(seed)
        works = (*(self._stream for _ in range(_NUM_STREAMS)), self._come_and_go)
        self._threads = [
            threading.Thread(target=self._repeat, args=(work, random.Random(draws.random())), daemon=True)
            for work in works
        ]

    def __enter__(self) -> Churn:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()

    def _repeat(self, work: Any, draws: random.Random) -> None:
        with Client(self._address, timeout_s=20) as client:
            while not self._is_over.is_set():
                with suppress(ClientError):
                    work(client, draws)

    def _stream(self, client: Client, draws: random.Random) -> None:
        adaptation = draws.choice(
            (
                {},
                {"adapter": draws.choice(ADAPTERS)},
                {"blend": dict.fromkeys(draws.sample(ADAPTERS, 2), 0.5)},
                {"fusion": FUSION},
            )
        )
        num_tokens = draws.randint(1, 60)
        for _ in client.stream("The next", max_new_tokens=num_tokens, seed=draws.randrange(99), **adaptation):
            if self._is_over.is_set() or draws.random() < 0.01:
                return

    def _come_and_go(self, client: Client, draws: random.Random) -> None:
        store = client.fusions if draws.random() < 0.2 else client.adapters
        name = FUSION if store is client.fusions else draws.choice(ADAPTERS)
        match draws.randrange(4):
            case 0:
                store.load(name)
            case 1:
                store.reload(name)
            case 2:
                store.unload(name)
            case 3:
                store.unload(name, force=True)
