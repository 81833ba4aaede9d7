"""What clients say is in no log, whatever goes wrong, and tenants do not find each other's prompts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from server_process import FUSIONSERVE, ServerProcess, server_process
from token_files import SECRETS, write_tokens

from fusionserve.client import Client, ClientError

MARK = "xyzzy-plugh"
GREEDY = {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True}
PROMPT = f"{MARK} " * 12


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    path = write_tokens(tmp_path_factory.mktemp("tokens") / "tokens.toml")
    with server_process("--token-file", str(path)) as server:
        yield server


def client_of(server: ServerProcess, name: str) -> Client:
    return Client(server.grpc, token=SECRETS[name], timeout_s=60)


def test_prompts_are_found_within_a_tenant_and_not_across(server: ServerProcess) -> None:
    def cached(name: str) -> int:
        with client_of(server, name) as client:
            return client.generate(PROMPT, **GREEDY).usage.cached_tokens

    assert cached("team-a") == 0
    assert cached("team-a") > 0
    assert cached("team-b") == 0, "nor does a salt that spells another's name help"
    assert cached("team-b") > 0


def test_request_ids_are_each_tenants_own(server: ServerProcess) -> None:
    with client_of(server, "team-a") as a, client_of(server, "team-b") as b:
        stream = a.stream("The", request_id="same", max_new_tokens=200, ignore_eos=True)
        next(stream)
        assert b.generate("The", request_id="same", **GREEDY).request_id == "same"
        stream.close()


def test_command_line_brings_its_token(server: ServerProcess) -> None:
    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        command = [FUSIONSERVE, "adapters", "list", "--server", server.grpc]
        return subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, timeout=30, check=False
        )

    refused, served = run(FUSIONSERVE_TOKEN=""), run(FUSIONSERVE_TOKEN=SECRETS["reader"])
    assert (refused.returncode, served.returncode) == (1, 0)
    assert "UNAUTHENTICATED TOKEN_REQUIRED" in refused.stderr
    assert "perl" in served.stdout


def test_nothing_that_was_said_is_logged(tmp_path: Path) -> None:
    flags = ("--token-file", str(write_tokens(tmp_path / "tokens.toml")), "--log-level", "debug")
    with server_process(*flags, failpoints="engine.step=8+3*raise;host.publish=1*raise") as server:
        with client_of(server, "boss") as client:
            output = say(client)
        server.terminate()
        assert server.wait() == 0
    assert "a failpoint was reached" in server.log, "errors are logged, and their stacks"
    assert MARK not in server.log
    assert output not in server.log
    assert not any(secret in server.log for secret in SECRETS.values())


def say(client: Client) -> str:
    """Puts the mark wherever a request has room for text, and provokes what errors it can; an output at last."""
    requests: tuple[dict[str, object], ...] = (
        *({}, {}, {}, {"stop": [MARK]}, {"cache_salt": MARK}, {"request_id": MARK + "\0"}),
        *({"adapter": MARK}, {"adapter": "perl"}, {"adapter": "perl"}),
        *({"stop": [MARK * 100]}, {"max_new_tokens": 10**6}),
    )
    for fields in requests:
        with suppress(ClientError):
            client.generate(PROMPT, **{**GREEDY, **fields})
    for prompt in ([{"role": MARK, "content": MARK}], PROMPT * 1000):
        with suppress(ClientError):
            list(client.stream(prompt, **GREEDY))
    client.tokenize(PROMPT)
    return client.generate(PROMPT, **{**GREEDY, "max_new_tokens": 24}).text


def test_requests_are_logged_as_far_as_asked(tmp_path: Path) -> None:
    for detail, shows_text in (("meta", False), ("text", True)):
        with server_process("--log-requests", detail) as server:
            with Client(server.grpc, timeout_s=60) as client:
                output = client.generate(MARK + "\nforged line", request_id="r-1", **GREEDY).text
            server.terminate()
            assert server.wait() == 0
        (line,) = [line for line in server.log.splitlines() if "request='r-1'" in line]
        assert "caller=- kind=base status=OK finish=length" in line and "generated_tokens=4" in line
        assert (MARK in line, repr(output) in line) == (shows_text, shows_text)
        assert not any(line.startswith("forged") for line in server.log.splitlines())


def test_load_test_brings_its_token_and_tells_nobody(server: ServerProcess, tmp_path: Path) -> None:
    command = [FUSIONSERVE, "loadtest", "--server", server.grpc, "--requests", "4", "--out", str(tmp_path)]
    done = subprocess.run(
        command,
        env=os.environ | {"FUSIONSERVE_TOKEN": SECRETS["team-a"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 2
    assert not any(SECRETS["team-a"].encode() in data for data in (done.stdout.encode(), *written))
