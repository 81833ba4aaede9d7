"""The servicers' view of the engine is what both engines offer."""

from __future__ import annotations

import inspect

import pytest
from fake_engine import FakeEngine

from fusionserve.engine.async_engine import AsyncEngine
from fusionserve.server.engine_facade import EngineFacade

METHODS = sorted(name for name, value in vars(EngineFacade).items() if callable(value) and name[0] != "_")


def shape(method: object) -> tuple[bool, list[tuple[str, object]]]:
    """Whether a call is awaited, and its parameters' names and kinds."""
    assert callable(method)
    parameters = inspect.signature(method).parameters.values()
    return inspect.iscoroutinefunction(method), [(parameter.name, parameter.kind) for parameter in parameters]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("engine", [AsyncEngine, FakeEngine])
def test_engine_has_the_facades_methods(engine: type, name: str) -> None:
    assert shape(getattr(engine, name)) == shape(getattr(EngineFacade, name))
