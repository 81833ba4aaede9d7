"""The real thing: `fusionserve serve` in a process of its own, with the embedded model, used as its clients use it."""

import hashlib
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from grpc_requests import Client as ReflectionClient
from server_process import FUSIONSERVE, ServerProcess, server_process

from fusionserve.client import (
    AbortedError,
    Client,
    DataLossError,
    FailedPreconditionError,
    Generation,
    GenerationChunk,
    InvalidRequestError,
    NotFoundError,
)
from fusionserve.config import EMBEDDED_ADAPTERS, EMBEDDED_FUSIONS

GREEDY = {"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True}
SEEDED = {**GREEDY, "temperature": 0.8, "seed": 5}
LONG = {**GREEDY, "max_new_tokens": 300}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """One server for the whole file; its clean exit is part of what is tested."""
    with server_process() as server:
        yield server
        server.terminate()
        assert server.wait() == 0


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.grpc, timeout_s=60) as client:
        yield client


def test_adaptations_differ_and_are_the_same_in_company(client: Client) -> None:
    names = [adapter.name for adapter in client.adapters.list()]
    assert len(names) >= 4
    requests = [{}, *({"adapter": name} for name in names), {"blend": {names[0]: 0.5, names[1]: 0.5}}]
    alone = [client.generate("The", **SEEDED, **request).text for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda request: client.generate("The", **SEEDED, **request).text, requests))
    assert together == alone
    assert len(set(alone)) == len(alone)


def test_stream_is_the_generation_in_pieces(client: Client) -> None:
    expected = client.generate("sub new {", adapter="perl", **GREEDY)
    *earlier, last = client.stream("sub new {", adapter="perl", **GREEDY)
    assert isinstance(last, Generation)
    assert last.candidates == expected.candidates
    assert "".join(event.text for event in earlier if isinstance(event, GenerationChunk)) == expected.text
    assert last.adaptation.members[0].digest == client.adapters.get("perl").digest


def test_a_stream_by_several_tokens_has_as_few_messages(client: Client) -> None:
    """With what goes with each token, and for every candidate."""
    options = {**SEEDED, "num_candidates": 2, "logprobs": 1}
    expected = client.generate("sub new {", **options).candidates
    *earlier, last = client.stream("sub new {", stream_interval=10, **options)
    assert isinstance(last, Generation)
    assert last.candidates == expected
    for candidate in expected:
        chunks = [
            each for each in earlier if isinstance(each, GenerationChunk) and each.index == candidate.index
        ]
        assert len(chunks[0].token_ids) < 10
        assert len(chunks) <= 7, "the first and two of ten, what goes with the other candidate's, the last"
        assert "".join(each.text for each in chunks) == candidate.text
        for name in ("token_ids", "logprobs"):
            assert sum((getattr(each, name) for each in chunks), ()) == getattr(candidate, name)


def test_reload_and_unload_leave_other_streams_alone(client: Client) -> None:
    expected = client.generate("The", **LONG).candidates
    client.generate("The", adapter="spanish", **GREEDY)
    with client.stream("The", **LONG) as stream:
        next(stream)
        version = client.adapters.get("spanish").version
        assert client.adapters.reload("spanish").version == version + 1
        client.adapters.unload("spanish")
        *_, last = stream
    assert isinstance(last, Generation)
    assert last.candidates == expected


def test_forced_unload_ends_its_streams_with_a_status(client: Client) -> None:
    with client.stream("The", adapter="spanish", **LONG) as stream:
        next(stream)
        client.adapters.unload("spanish", force=True)
        with pytest.raises(AbortedError) as caught:
            list(stream)
    assert caught.value.reason == "ADAPTER_UNLOADED"


def test_mistakes_get_their_status(client: Client) -> None:
    with pytest.raises(NotFoundError, match="ADAPTER_NOT_FOUND"):
        client.generate("x", adapter="nobody")
    with pytest.raises(InvalidRequestError, match="TOKEN_OUT_OF_RANGE"):
        client.generate([10**6], **GREEDY)
    with pytest.raises(InvalidRequestError, match="PROMPT_TOO_LONG"):
        client.generate([1] * 5000, **GREEDY)
    with pytest.raises(InvalidRequestError, match="CONTEXT_EXCEEDED"):
        client.generate("x", max_new_tokens=10**6)
    with pytest.raises(InvalidRequestError):
        client.generate("x", adapter="../perl")
    with pytest.raises(FailedPreconditionError, match="NO_CHAT_TEMPLATE"):
        client.generate([{"role": "user", "content": "hi"}])


def test_metrics_follow_the_requests(server: ServerProcess, client: Client) -> None:
    key = 'fusionserve_requests_total{finish_reason="length",kind="lora",status="OK"}'
    before = server.scrape()
    client.generate("The", adapter="perl", **GREEDY)
    after = server.scrape()
    for _ in range(50):  # a request is counted once its answer has left
        if after.get(key) == before.get(key, 0) + 1:
            break
        time.sleep(0.1)
        after = server.scrape()
    assert after[key] == before.get(key, 0) + 1
    tokens = 'fusionserve_adapter_generated_tokens_total{adapter="perl"}'
    assert after[tokens] == before.get(tokens, 0) + GREEDY["max_new_tokens"]
    assert after["fusionserve_requests_running"] == 0
    assert after["fusionserve_kv_blocks_used"] == 0


def test_reflection_client_needs_no_proto(server: ServerProcess) -> None:
    client = ReflectionClient.get_by_endpoint(server.grpc)
    answer = client.request("fusionserve.v1.AdapterService", "ListAdapters", {})
    assert any(adapter["name"] == "perl" for adapter in answer["adapters"])
    request = {"request": {"text": "The", "stopping": {"max_new_tokens": 4}}}
    *_, last = client.request("fusionserve.v1.InferenceService", "StreamGenerate", request)
    assert last["finished"]["usage"]["generated_tokens"] == 4


def sha256_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


DIGESTS = {
    ("adapters", "cpp"): sha256_of(EMBEDDED_ADAPTERS / "cpp" / "adapter_model.safetensors"),
    ("fusions", "domains"): sha256_of(EMBEDDED_FUSIONS / "domains" / "fusion_model.safetensors"),
}


@pytest.mark.parametrize(("noun", "name"), DIGESTS)
def test_only_weights_of_the_digest_asked_for_are_loaded(client: Client, noun: str, name: str) -> None:
    life, digest = getattr(client, noun), DIGESTS[noun, name]
    with pytest.raises(DataLossError) as caught:
        life.load("checked", name, sha256="0" * 64)
    assert caught.value.reason == "CHECKSUM_MISMATCH"
    with pytest.raises(NotFoundError):
        life.get("checked")
    assert life.load("checked", name, sha256=digest).digest == digest
    with pytest.raises(DataLossError, match="CHECKSUM_MISMATCH"):
        life.reload("checked", name, sha256="0" * 64)
    assert life.get("checked").version == 1
    assert life.reload("checked", name, sha256=digest).version == 2
    life.unload("checked")


@pytest.mark.parametrize("noun", ["adapters", "fusions"])
@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "0" * 64 + "\n"])
def test_digest_that_is_none_is_refused(client: Client, noun: str, digest: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        getattr(client, noun).load("nobody", sha256=digest)
    assert caught.value.reason == "DIGEST_INVALID"
    assert [violation.field for violation in caught.value.field_violations] == ["sha256"]


@pytest.mark.parametrize(("noun", "name"), DIGESTS)
def test_command_line_loads_by_digest(server: ServerProcess, client: Client, noun: str, name: str) -> None:
    environment = {**os.environ, "FUSIONSERVE_SERVER": server.grpc}

    def reload(digest: str) -> subprocess.CompletedProcess[str]:
        command = [FUSIONSERVE, noun, "reload", name, "--sha256", digest]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    right, wrong = reload(DIGESTS[noun, name]), reload("0" * 64)
    assert right.returncode == 0
    assert name in right.stdout
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("error: DATA_LOSS CHECKSUM_MISMATCH")
    assert getattr(client, noun).get(name).digest == DIGESTS[noun, name]


def test_command_line_generates_and_lists(server: ServerProcess, client: Client) -> None:
    environment = {**os.environ, "FUSIONSERVE_SERVER": server.grpc}
    generate = [FUSIONSERVE, "generate", "--prompt", "The", "--temperature", "0", "--max-new-tokens", "24"]
    shown = subprocess.run(
        [*generate, "--ignore-eos"], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert client.generate("The", **GREEDY).text.strip() in shown.stdout
    unknown = subprocess.run(
        [*generate, "--adapter", "nobody"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert unknown.returncode == 1
    assert unknown.stderr.startswith("error: NOT_FOUND ADAPTER_NOT_FOUND")
    listed = subprocess.run(
        [FUSIONSERVE, "adapters", "list"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "perl" in listed.stdout
