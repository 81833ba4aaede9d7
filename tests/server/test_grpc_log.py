"""Metadata that is no text, and what of it is logged."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from server_fixture import Served, serving_server
from token_files import write_tokens

from fusionserve.loadtest.hostile.metadata import GET_MODEL, NO_TEXT
from fusionserve.loadtest.hostile.raw import call_raw
from fusionserve.loadtest.hostile.target import Target


def target_of(served: Served) -> Target:
    return Target(grpc=str(served.app.grpc_address), metrics=str(served.app.metrics_address))


async def test_metadata_that_is_no_text_is_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving_server(token_file=write_tokens(tmp_path / "tokens.toml")) as served:
        answer = await call_raw(target_of(served), GET_MODEL, NO_TEXT)
    assert b"grpc-status\x0216" in answer  # UNAUTHENTICATED
    assert caplog.text == ""


async def test_other_complaints_of_grpc_are_logged(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("grpc._cython.cygrpc").error("the port is on fire")
    assert "on fire" in caplog.text
