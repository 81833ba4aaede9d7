"""One served fake engine per test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from server_fixture import Served, serving_server


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving_server() as server:
        yield server
