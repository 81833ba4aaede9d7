"""Fusions through `fusionserve serve` in a process of its own: flags, and their life while requests use them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fusionserve.client import (
    AbortedError,
    AdapterState,
    Client,
    FailedPreconditionError,
    Generation,
    InvalidRequestError,
    NotFoundError,
)
from fusionserve.config import EMBEDDED_FUSIONS, EMBEDDED_MODEL_NAME

FUSIONSERVE = str(Path(sys.executable).with_name("fusionserve"))
SERVE = (FUSIONSERVE, "serve", "--dtype", "float32", "--listen", "127.0.0.1:0", "--metrics-listen", "off")
EMBEDDED_FUSION = EMBEDDED_FUSIONS / "domains"
GREEDY = {"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True}
LONG = {**GREEDY, "max_new_tokens": 300}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with fusions of every origin: `lazy` in a folder, `early` and `leaving` named at the start."""
    folder = tmp_path_factory.mktemp("fusions")
    shutil.copytree(EMBEDDED_FUSION, folder / "lazy")
    command = [*SERVE, "--fusion-dir", str(folder), "--fusion-host-size", "64MiB"]
    for name in ("early", "leaving"):
        command += ["--fusion", f"{name}={EMBEDDED_FUSION}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    ready = process.stdout.readline().split()
    assert ready[:1] == ["ready"], ready
    yield ready[1].removeprefix("grpc=")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    process.stdout.close()


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with Client(target, timeout_s=60) as client:
        yield client


def test_fusions_of_folder_and_flag_are_the_same_fusion(client: Client, target: str) -> None:
    states = {fusion.name: fusion.state for fusion in client.fusions.list()}
    assert (states["lazy"], states["early"]) == (AdapterState.AVAILABLE, AdapterState.READY)
    texts = {name: client.generate("The", fusion=name, **GREEDY).text for name in ("lazy", "early")}
    assert texts["lazy"] == texts["early"] != client.generate("The", **GREEDY).text
    listed = subprocess.run(
        [FUSIONSERVE, "fusions", "list"],
        env={**os.environ, "FUSIONSERVE_SERVER": target},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "lazy" in listed.stdout
    assert "early" in listed.stdout


def test_members_say_which_fusions_hold_them(client: Client) -> None:
    client.generate("The", fusion="lazy", **GREEDY)
    held = client.adapters.get("perl").held_by_fusions
    assert {"early", "lazy"} <= set(held)
    assert list(held) == sorted(held)
    with pytest.raises(FailedPreconditionError, match="ADAPTER_HELD_BY_FUSION"):
        client.adapters.unload("perl", force=True)
    client.fusions.unload("lazy")
    assert "lazy" not in client.adapters.get("perl").held_by_fusions


def test_unloaded_fusion_ends_its_stream_first_and_is_gone_then(client: Client) -> None:
    expected = client.generate("The", fusion="leaving", **LONG).candidates
    with (
        ThreadPoolExecutor(1) as pool,
        client.stream("The", fusion="leaving", cache_salt="new", **LONG) as stream,
    ):
        next(stream)
        unloading = pool.submit(client.fusions.unload, "leaving")
        while client.fusions.get("leaving").state is not AdapterState.DRAINING:
            time.sleep(0.001)  # the stream ends long after this, else there would be nothing to get
        *_, last = stream
        unloading.result(60)
    assert isinstance(last, Generation)
    assert last.candidates == expected
    with pytest.raises(NotFoundError, match="FUSION_NOT_FOUND"):
        client.generate("The", fusion="leaving", **GREEDY)
    with pytest.raises(NotFoundError, match="FUSION_NOT_FOUND"):
        client.fusions.get("leaving")


def test_forced_unload_ends_its_streams_with_a_status(client: Client) -> None:
    with client.stream("The", fusion="lazy", **LONG) as stream:
        next(stream)
        assert client.fusions.unload("lazy", force=True).state is AdapterState.AVAILABLE
        with pytest.raises(AbortedError) as caught:
            list(stream)
    assert caught.value.reason == "FUSION_UNLOADED"


def test_name_of_the_base_is_refused(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="FUSION_ID_INVALID"):
        client.fusions.load(EMBEDDED_MODEL_NAME, "lazy")
    with pytest.raises(InvalidRequestError, match="FUSION_ID_INVALID"):
        client.generate("The", fusion=EMBEDDED_MODEL_NAME, **GREEDY)


def test_fusion_over_the_host_size_stops_the_start() -> None:
    command = [*SERVE, "--fusion", f"early={EMBEDDED_FUSION}", "--fusion-host-size", "1KiB"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "fusion early: the fusion takes" in done.stderr.splitlines()[-1]
