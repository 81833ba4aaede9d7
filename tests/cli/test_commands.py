"""The commands that talk to a server, against a served fake engine."""

import asyncio
import io
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from server_fixture import Served, serving_server

from fusionserve.model_info import ModelInfo
from fusionserve.server.commands.connection import to_access
from fusionserve.server.main import main


@dataclass(frozen=True)
class Outcome:
    """What a command left."""

    code: int
    out: str
    err: str


class Shell:
    """Runs `fusionserve` commands for a server."""

    def __init__(self, served: Served, capsys: pytest.CaptureFixture[str]) -> None:
        self._server = str(served.app.grpc_address)
        self._capsys = capsys

    async def run(self, *argv: str) -> Outcome:
        """The outcome of one command line."""
        code = await asyncio.to_thread(main, [*argv, "--server", self._server])
        return Outcome(code, *self._capsys.readouterr())


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving_server() as server:
        yield server


@pytest.fixture
def shell(served: Served, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(served, capsys)


async def test_generate_prints_the_text(shell: Shell) -> None:
    outcome = await shell.run("generate", "--prompt", "ab", "--adapter", "alpha", "--max-new-tokens", "2")
    assert outcome == Outcome(0, "lora0 lora1 \n", "")


async def test_generate_reads_standard_input(
    shell: Shell, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert (await shell.run("generate")).code == 0
    assert served.engine.params[0].prompt.text == "from a pipe"  # type: ignore[union-attr]


async def test_generate_sends_its_settings(
    shell: Shell, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSIONSERVE_GENERATE_SEED", "7")
    argv = (
        "--blend",
        "alpha=0.5,beta=0.25",
        "--temperature",
        "0",
        "--stop",
        "a",
        "--stop",
        "b",
        "--ignore-eos",
    )
    assert (await shell.run("generate", "--prompt", "x", *argv)).code == 0
    (params,) = served.engine.params
    assert [(term.name, term.scale) for term in params.adaptation.terms] == [("alpha", 0.5), ("beta", 0.25)]
    assert (params.sampling.temperature, params.sampling.seed) == (0.0, 7)
    assert (params.stopping.stop, params.stopping.ignore_eos) == (("a", "b"), True)


async def test_generate_prints_json_and_stats(shell: Shell) -> None:
    outcome = await shell.run("generate", "--prompt", "ab", "--json", "--stats")
    result = json.loads(outcome.out)
    assert result["candidates"][0]["finish_reason"] == "length"
    assert result["usage"] == {"prompt_tokens": 2, "cached_tokens": 0, "generated_tokens": 4}
    assert outcome.err.startswith("base: 2 prompt tokens (0 cached), 4 generated in 0.00 s")


async def test_generate_prints_every_candidate(shell: Shell) -> None:
    flags = ("--num-candidates", "2", "--max-new-tokens", "2")
    outcome = await shell.run("generate", "--prompt", "ab", *flags)
    assert outcome.out == (
        "candidate 0, ended by length:\nbase0 base1 \n\ncandidate 1, ended by length:\nbase0 base1 \n"
    )
    result = json.loads((await shell.run("generate", "--prompt", "ab", "--json", *flags)).out)
    assert [candidate["index"] for candidate in result["candidates"]] == [0, 1]


async def test_generate_tells_log_probabilities(shell: Shell) -> None:
    flags = ("--prompt", "ab", "--max-new-tokens", "1", "--logprobs")
    assert (await shell.run("generate", *flags, "0")).err == '  -0.500  rank 1  "base0 "\n'
    outcome = await shell.run("generate", *flags, "1", "--num-candidates", "2")
    line = '  -0.500  rank 1  "base0 "  likeliest: "t0" -1.000'
    assert outcome.err.splitlines() == ["candidate 0:", line, "candidate 1:", line]


async def test_generate_sends_its_time_limit_and_salt(shell: Shell, served: Served) -> None:
    flags = ("--time-limit", "1500ms", "--cache-salt", "mine")
    assert (await shell.run("generate", "--prompt", "x", *flags)).code == 0
    (params,) = served.engine.params
    assert (params.stopping.time_limit_s, params.cache_salt) == (1.5, "mine")


async def test_server_errors_exit_with_1(shell: Shell) -> None:
    outcome = await shell.run("generate", "--prompt", "x", "--adapter", "nobody")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == "error: NOT_FOUND ADAPTER_NOT_FOUND: there is no such adapter\n"


async def test_contradicting_flags_exit_with_2(shell: Shell) -> None:
    outcome = await shell.run("generate", "--prompt", "x", "--adapter", "alpha", "--blend", "beta=1")
    assert (outcome.code, outcome.err) == (
        2,
        "fusionserve: --adapter, --blend and --fusion exclude each other\n",
    )


async def test_no_prompt_at_a_terminal_exits_with_2(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert (await shell.run("generate")).code == 2


async def test_interrupt_exits_with_130(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fusionserve.server.commands.generate.print_stream", interrupt)
    assert await shell.run("generate", "--prompt", "x") == Outcome(130, "", "")


async def test_adapters_list_is_an_aligned_table(shell: Shell) -> None:
    lines = (await shell.run("adapters", "list")).out.splitlines()
    assert lines[0].split() == [
        "NAME",
        "STATE",
        "RESIDENCY",
        "VERSION",
        "RANK",
        "SIZE",
        "PINNED",
        "ACTIVE",
        "FUSIONS",
        "DIGEST",
    ]
    assert [line.split()[0] for line in lines[1:]] == ["alpha", "beta"]
    assert {line.index("host") for line in lines[1:]} == {lines[0].index("RESIDENCY")}


async def test_fusions_live(shell: Shell, served: Served) -> None:
    listed = (await shell.run("fusions", "list")).out.splitlines()
    assert [line.split()[0] for line in listed] == ["NAME", "mix"]
    assert (await shell.run("fusions", "load", "duo", "--path", "x/duo", "--pin")).code == 0
    assert served.engine.fusions["duo"].pinned
    (described,) = json.loads((await shell.run("fusions", "get", "duo", "--json")).out)
    assert (described["name"], described["state"]) == ("duo", "ready")
    assert (await shell.run("fusions", "unload", "duo")).code == 0
    assert "duo" not in served.engine.fusions


async def test_generate_applies_a_fusion_and_shows_its_weights(shell: Shell, served: Served) -> None:
    flags = ("--fusion", "mix", "--exclude-member", "beta", "--fusion-weights", "mean")
    outcome = await shell.run("generate", "--prompt", "x", *flags)
    assert outcome.code == 0
    adaptation = served.engine.params[-1].adaptation
    assert (adaptation.kind, adaptation.fusion, adaptation.excluded_members) == ("fusion", "mix", ("beta",))
    assert outcome.err.startswith("mean: alpha ")


@pytest.mark.parametrize("flags", [("--exclude-member", "beta"), ("--fusion-weights", "mean")])
async def test_flags_of_a_fusion_need_one(shell: Shell, flags: tuple[str, str]) -> None:
    outcome = await shell.run("generate", "--prompt", "x", *flags)
    assert (outcome.code, outcome.err) == (2, f"fusionserve: {flags[0]} needs --fusion\n")


async def test_adapters_live(shell: Shell, served: Served) -> None:
    assert (await shell.run("adapters", "load", "gamma", "--path", "x/gamma", "--pin")).code == 0
    assert served.engine.adapters["gamma"].pinned
    assert (await shell.run("adapters", "reload", "gamma")).code == 0
    (described,) = json.loads((await shell.run("adapters", "get", "gamma", "--json")).out)
    assert (described["version"], described["state"], described["pinned"]) == (2, "ready", True)
    assert (await shell.run("adapters", "unload", "gamma", "--force")).code == 0
    assert (await shell.run("adapters", "get", "gamma")).code == 1


@pytest.fixture
def chat_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model has one."""
    without_template = FakeEngine.model_info

    def model_info(self: FakeEngine) -> ModelInfo:
        return replace(without_template(self), has_chat_template=True)

    monkeypatch.setattr(FakeEngine, "model_info", model_info)


async def test_one_file_serves_all_actions(shell: Shell, served: Served, tmp_path: Path) -> None:
    file = tmp_path / "adapters.yaml"
    file.write_text("pin: on\nforce: on\njson: on\n")
    for action in (("list",), ("load", "gamma"), ("unload", "gamma")):
        outcome = await shell.run("adapters", *action, "--config", str(file))
        assert outcome.code == 0 and json.loads(outcome.out)
    file.write_text("pni: on\n")
    outcome = await shell.run("adapters", "list", "--config", str(file))
    assert outcome == Outcome(2, "", f"fusionserve: {file}: unknown key 'pni'; did you mean 'pin'?\n")


@pytest.mark.parametrize("command", [("adapters", "list"), ("loadtest", "--requests", "1")])
async def test_certificate_of_a_server_beside_is_not_shown(
    command: tuple[str, ...], shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSIONSERVE_TLS_CERT", "/nowhere/server.pem")
    monkeypatch.setenv("FUSIONSERVE_TLS_KEY", "/nowhere/server.key")
    assert (await shell.run(*command)).code == 0
    monkeypatch.setenv("FUSIONSERVE_CLIENT_TLS_CERT", "/nowhere/client.pem")
    monkeypatch.setenv("FUSIONSERVE_CLIENT_TLS_KEY", "/nowhere/client.key")
    outcome = await shell.run(*command)
    assert outcome == Outcome(2, "", "fusionserve: /nowhere/client.pem: No such file or directory\n")


@pytest.mark.parametrize("command", [("adapters", "list"), ("loadtest", "--requests", "1")])
def test_token_goes_to_no_other_machine_in_the_clear(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSIONSERVE_TOKEN", "s3cret")
    monkeypatch.setenv("FUSIONSERVE_ALLOW_INSECURE", "on")  # what a server beside may do
    assert main([*command, "--server", "192.0.2.2:1"]) == 2
    assert capsys.readouterr().err == (
        "fusionserve: the token would go to 192.0.2.2:1 in the clear: give --tls-ca, or --allow-insecure on\n"
    )
    settings = {"server": "192.0.2.2:1", "token": "s3cret", "tls-cert": None, "tls-key": None}
    assert to_access({**settings, "tls-ca": None, "allow-insecure": True}).token == "s3cret"
    assert to_access({**settings, "tls-ca": "public", "allow-insecure": False}).credentials is not None


async def test_public_authorities_are_trusted_under_tls(shell: Shell) -> None:
    outcome = await shell.run("adapters", "list", "--tls-ca", "public")
    assert outcome.code == 1, "the server has no TLS"
    assert outcome.err.startswith("error: UNAVAILABLE")


async def test_chat_needs_a_template(shell: Shell) -> None:
    outcome = await shell.run("chat")
    assert (outcome.code, outcome.err) == (
        1,
        "error: the model has no chat template; use `fusionserve generate`\n",
    )


@pytest.mark.usefixtures("chat_template")
async def test_chat_survives_a_refused_turn(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("too much\nless\n"))
    outcome = await shell.run("chat", "--temperature", "-1")
    assert outcome.code == 1, "a script is told"
    assert outcome.err.count("error: INVALID_ARGUMENT") == 2


@pytest.mark.usefixtures("chat_template")
async def test_chat_of_a_person_ends_well_whatever_was_refused(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("too much\n"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert (await shell.run("chat", "--temperature", "-1")).code == 0


@pytest.mark.usefixtures("chat_template")
async def test_chat_keeps_the_history(shell: Shell, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nmore\n/reset\nagain\n"))
    assert (await shell.run("chat", "--system", "be brief", "--max-new-tokens", "1")).code == 0
    system = ("system", "be brief")
    first = (system, ("user", "hello"))
    assert [params.prompt.messages for params in served.engine.params] == [  # type: ignore[union-attr]
        first,
        (*first, ("assistant", "base0 "), ("user", "more")),
        (system, ("user", "again")),
    ]
