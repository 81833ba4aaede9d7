"""The requests of a soak, and what each of them gets when nobody else is there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from fusionserve.client import AsyncClient, GenerateOptions

ADAPTERS = ("changelog", "cpp", "perl", "polish", "spanish")
COPIES = tuple(f"{name}-again" for name in ADAPTERS)  # other names, so that there is less room than adapters
FUSION = "domains"
_PROMPTS = ("The first line of the file", "sub new {", "Dzień dobry, ")
_NEW_TOKENS = (8, 120)

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SoakRequest:
    """A request that gets the same tokens whenever it is sent."""

    prompt: str
    options: GenerateOptions

    @property
    def is_adapted(self) -> bool:
        """True if unloading something may end it."""
        return bool(self.options.keys() & {"adapter", "blend", "fusion"})

    def __str__(self) -> str:
        return f"{self.prompt!r} {self.options}"


def draw_requests(count: int, draws: random.Random) -> list[SoakRequest]:
    """`count` distinct requests, of every kind if there are a few; greedy and seeded ones."""
    requests = [
        SoakRequest(prompt, options | {"max_new_tokens": draws.randint(*_NEW_TOKENS), "ignore_eos": True})
        for prompt, options in product(_PROMPTS, (a | s for a in _adaptations() for s in _samplings()))
    ]
    draws.shuffle(requests)
    return requests[:count]


async def references(client: AsyncClient, requests: Sequence[SoakRequest]) -> list[Tokens]:
    """The tokens of each, one after the other on an idle server."""
    return [
        (await client.generate(request.prompt, timeout_s=60, **request.options)).token_ids
        for request in requests
    ]


def _adaptations() -> list[GenerateOptions]:
    return [
        {},
        {},
        {"fusion": FUSION},
        {"fusion": FUSION, "excluded_members": ["perl"]},
        *(GenerateOptions(adapter=name) for name in (*ADAPTERS, *COPIES)),
        {"adapter": ADAPTERS[0], "scale": 0.5},
        {"blend": {ADAPTERS[1]: 0.6, COPIES[2]: 0.4}},
        {"blend": dict.fromkeys(ADAPTERS[2:], 0.3)},
    ]


def _samplings() -> list[GenerateOptions]:
    return [
        {"temperature": 0.0},
        {"temperature": 0.8, "seed": 11},
        {"temperature": 1.1, "seed": 12, "top_p": 0.9, "top_k": 50},
    ]
