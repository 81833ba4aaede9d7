"""Tokens, allow-lists and limits, through a real channel to a served fake engine."""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from server_fixture import Served, failure_of, serving_server
from token_files import SECRETS, bearing, entry, write_tokens

from fusionserve.errors import HeldByFusionsError, StartupError
from fusionserve.server import access
from fusionserve.server.token_limits import TokenLimits
from fusionserve.server.tokens import Role, Token, Tokens, read_tokens
from fusionserve.v1 import adapter_pb2, inference_pb2


def generate(served: Served, who: str, **fields: object) -> object:
    request = inference_pb2.GenerateRequest(**{"text": "a", **fields})
    return served.inference.Generate(request, metadata=bearing(who))


def adapter(name: str) -> dict[str, object]:
    return {"adapter": inference_pb2.AdapterSelection(name=name)}


async def test_health_needs_no_token_and_reflection_does(tmp_path: Path) -> None:
    async with serving_server(token_file=write_tokens(tmp_path / "tokens.toml")) as served:
        assert (await served.health.Check(health_pb2.HealthCheckRequest())).status == 1
        stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        for metadata, is_answered in (((), False), (bearing("reader"), True)):
            failure = await failure_of(stub.ServerReflectionInfo(iter([asked]), metadata=metadata))
            assert (failure is None) is is_answered


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("Bearer wrong", "TOKEN_INVALID"),
        ("Bearer", "TOKEN_REQUIRED"),
        ("Bearer ", "TOKEN_REQUIRED"),
        ("Basic a-secret", "TOKEN_REQUIRED"),
        ("a-secret", "TOKEN_REQUIRED"),
        ("", "TOKEN_REQUIRED"),
    ],
)
async def test_bad_token_is_unauthenticated(value: str, reason: str, tmp_path: Path) -> None:
    async with serving_server(token_file=write_tokens(tmp_path / "tokens.toml")) as served:
        request = inference_pb2.GenerateRequest(text="a")
        failure = await failure_of(served.inference.Generate(request, metadata=(("authorization", value),)))
        assert failure is not None
        assert (failure.code.name, failure.reason) == ("UNAUTHENTICATED", reason)
        assert not served.engine.params, "nothing reaches the engine"


async def test_two_tokens_in_one_call_are_none(tmp_path: Path) -> None:
    async with serving_server(token_file=write_tokens(tmp_path / "tokens.toml")) as served:
        request = inference_pb2.GenerateRequest(text="a")
        both = bearing("team-a") + bearing("boss")
        failure = await failure_of(served.inference.Generate(request, metadata=both))
        assert failure is not None and failure.reason == "TOKEN_REQUIRED"


async def test_adapters_are_those_of_the_list(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens.toml", adapters=["al*"], base=False, max_priority=3)
    blend = inference_pb2.BlendSelection(
        members=[inference_pb2.BlendMember(name=name, weight=0.5) for name in ("alpha", "beta")]
    )
    cases: list[tuple[dict[str, object], str | None]] = [
        (adapter("alpha"), None),
        (adapter("beta"), "ADAPTER_NOT_ALLOWED"),
        (adapter("nowhere"), "ADAPTER_NOT_ALLOWED"),
        ({"blend": blend}, "ADAPTER_NOT_ALLOWED"),
        ({"fusion": inference_pb2.FusionSelection(name="mix")}, "FUSION_NOT_ALLOWED"),
        ({}, "BASE_NOT_ALLOWED"),
        ({**adapter("alpha"), "priority": 4}, "PRIORITY_NOT_ALLOWED"),
    ]
    async with serving_server(token_file=path) as served:
        for fields, reason in cases:
            failure = await failure_of(generate(served, "team-a", **fields))
            assert (failure and failure.reason) == reason
            assert failure is None or failure.code is grpc.StatusCode.PERMISSION_DENIED
        for fields, _ in cases:
            failure = await failure_of(generate(served, "team-b", **fields))
            assert failure is None or failure.reason == "ADAPTER_NOT_FOUND"
        get = adapter_pb2.GetAdapterRequest(name="beta")
        failure = await failure_of(served.adapters.GetAdapter(get, metadata=bearing("team-a")))
        assert failure is not None and failure.reason == "ADAPTER_NOT_ALLOWED"
        listed = await served.adapters.ListAdapters(
            adapter_pb2.ListAdaptersRequest(), metadata=bearing("team-a")
        )
        assert [each.name for each in listed.adapters] == ["alpha"]
        fusions = await served.adapters.ListFusions(
            adapter_pb2.ListFusionsRequest(), metadata=bearing("team-a")
        )
        assert list(fusions.fusions) == []


async def test_admin_of_some_adapters_loads_no_others(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(entry("team-a", "admin", SECRETS["team-a"], adapters=["a-*"]))
    async with serving_server(token_file=path) as served:
        for name, reason in (("a-one", None), ("b-one", "ADAPTER_NOT_ALLOWED")):
            for call, request in (
                (served.adapters.LoadAdapter, adapter_pb2.LoadAdapterRequest(name=name)),
                (served.adapters.UnloadAdapter, adapter_pb2.UnloadAdapterRequest(name=name)),
            ):
                failure = await failure_of(call(request, metadata=bearing("team-a")))
                assert (failure and failure.reason) == reason


@pytest.mark.parametrize("path", ["b-one", "b-one/v2", "sub/a-one"])
async def test_admin_of_some_adapters_loads_from_no_other_folder(path: str, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(entry("team-a", "admin", SECRETS["team-a"], adapters=["a-*"]))
    async with serving_server(token_file=tokens) as served:
        for load, request, noun in (
            (served.adapters.LoadAdapter, adapter_pb2.LoadAdapterRequest, "ADAPTER"),
            (served.adapters.LoadFusion, adapter_pb2.LoadFusionRequest, "FUSION"),
        ):
            for place, reason in ((path, f"{noun}_NOT_ALLOWED"), ("a-two/v2", None)):
                failure = await failure_of(
                    load(request(name="a-one", path=place), metadata=bearing("team-a"))
                )
                assert (failure and failure.reason) == reason


async def test_fusions_of_others_are_not_named(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(entry("team-a", "admin", SECRETS["team-a"], adapters=["a-*"]))
    async with serving_server(token_file=tokens) as served:
        await served.engine.load_adapter("a-one", None, pin=False, replace=False)
        held = replace(served.engine.adapters["a-one"], held_by_fusions=("a-mix", "b-mix", "c-mix"))
        served.engine.adapters["a-one"] = held
        token = bearing("team-a")
        got = await served.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name="a-one"), metadata=token)
        listed = await served.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(), metadata=token)
        for adapter_told in (got.adapter, *listed.adapters):
            assert list(adapter_told.held_by_fusions) == ["a-mix"]
        served.engine.error = HeldByFusionsError("a-one", held.held_by_fusions)
        unload = adapter_pb2.UnloadAdapterRequest(name="a-one")
        failure = await failure_of(served.adapters.UnloadAdapter(unload, metadata=token))
        assert failure is not None and failure.code is grpc.StatusCode.FAILED_PRECONDITION
        assert "(a-mix, 2 more)" in failure.text and "b-mix" not in str(failure)


async def test_rate_is_refused_with_the_time_until_the_next_call(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens.toml", rate=5, burst=2)
    async with serving_server(token_file=path) as served:
        failures = [await failure_of(generate(served, "team-a")) for _ in range(3)]
        assert failures[:2] == [None, None]
        last = failures[2]
        assert last is not None
        assert (last.code.name, last.reason) == ("RESOURCE_EXHAUSTED", "RATE_LIMITED")
        pushback_ms = int(last.trailers["grpc-retry-pushback-ms"])
        assert 0 < pushback_ms <= 200
        assert await failure_of(generate(served, "team-b")) is None, "others are not held up"
        await asyncio.sleep(pushback_ms / 1000 + 0.01)
        assert await failure_of(generate(served, "team-a")) is None


async def test_open_generations_are_bounded_and_end_with_their_call(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens.toml", concurrency=1)
    async with serving_server(token_file=path) as served:
        served.engine.gate = asyncio.Event()
        request = inference_pb2.StreamGenerateRequest(request=inference_pb2.GenerateRequest(text="a"))
        open_one = served.inference.StreamGenerate(request, metadata=bearing("team-a"))
        await open_one.read()
        failure = await failure_of(generate(served, "team-a"))
        assert failure is not None and failure.reason == "TOO_MANY_REQUESTS"
        open_one.cancel()
        while served.engine.num_open:
            await asyncio.sleep(0.005)
        served.engine.gate.set()
        assert await failure_of(generate(served, "team-a")) is None


async def test_tenant_is_the_tokens_name(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens.toml")
    for shares, cache_tenant in ((False, "team-a"), (True, "")):
        async with serving_server(token_file=path, share_prefix_cache=shares) as served:
            assert await failure_of(generate(served, "team-a")) is None
            params = served.engine.params[0]
            assert (params.tenant, params.cache_tenant) == ("team-a", cache_tenant)


async def test_tokenizer_and_loader_know_their_tenant(tmp_path: Path) -> None:
    async with serving_server(token_file=write_tokens(tmp_path / "tokens.toml")) as served:
        text, ids = inference_pb2.TokenizeRequest(text="a"), inference_pb2.DetokenizeRequest(token_ids=[97])
        assert await failure_of(served.inference.Tokenize(text, metadata=bearing("reader"))) is None
        assert await failure_of(served.inference.Detokenize(ids, metadata=bearing("team-a"))) is None
        adapter, fusion = adapter_pb2.LoadAdapterRequest(name="a"), adapter_pb2.LoadFusionRequest(name="f")
        assert await failure_of(served.adapters.LoadAdapter(adapter, metadata=bearing("boss"))) is None
        await failure_of(served.adapters.LoadFusion(fusion, metadata=bearing("boss")))
        assert served.engine.tenants == ["reader", "team-a", "boss", "boss"]


async def test_file_is_reread_and_a_broken_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fusionserve.server.watched_file._LOOK_EVERY_S", 0.0)
    path = write_tokens(tmp_path / "tokens.toml")
    async with serving_server(token_file=path) as served:
        assert await failure_of(generate(served, "team-a")) is None
        path.write_text("not toml")
        assert await failure_of(generate(served, "team-a")) is None
        assert "tokens.toml changed and cannot be used" in caplog.text
        path.unlink()
        assert await failure_of(generate(served, "team-a")) is None
        path.write_text(entry("team-b", "generate", SECRETS["team-b"]))
        failure = await failure_of(generate(served, "team-a"))
        assert failure is not None and failure.reason == "TOKEN_INVALID"
        assert await failure_of(generate(served, "team-b")) is None


async def test_token_that_is_taken_out_opens_no_more_calls_and_its_streams_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusionserve.server.watched_file._LOOK_EVERY_S", 0.0)
    path = write_tokens(tmp_path / "tokens.toml")
    async with serving_server(token_file=path) as served:
        served.engine.gate = asyncio.Event()
        request = inference_pb2.StreamGenerateRequest(request=inference_pb2.GenerateRequest(text="a"))
        events = aiter(served.inference.StreamGenerate(request, metadata=bearing("team-a")))
        assert (await anext(events)).HasField("started")
        path.write_text(entry("team-b", "generate", SECRETS["team-b"]))
        failure = await failure_of(generate(served, "team-a"))
        assert failure is not None and failure.reason == "TOKEN_INVALID"
        served.engine.gate.set()
        *_, last = [event async for event in events]
        assert last.finished.usage.generated_tokens == 4


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "must have [[token]] tables"),
        ("token = 3", "must have [[token]] tables"),
        ("other = 1\n" + entry("a", "read", "x"), "and nothing else"),
        (entry("a", "read", "x", colour="red"), "unknown key 'colour'"),
        (entry("a", "king", "x"), "role must be one of"),
        (entry("A b", "read", "x"), "name must be"),
        (entry("a", "read", "x", rate="fast"), "rate has the wrong type"),
        (entry("a", "read", "x", rate=True), "rate has the wrong type"),
        (entry("a", "read", "x", rate=0), "rate must be above 0"),
        (entry("a", "read", "x", concurrency=0), "concurrency must be at least 1"),
        (entry("a", "read", "x", rate=1, burst=0), "burst must be at least 1"),
        (entry("a", "read", "x", burst=5), "burst needs a rate"),
        (entry("a", "read", "x", max_priority=1001), "max_priority must be -1000 to 1000"),
        (entry("a", "read", "x", max_priority=-1001), "max_priority must be -1000 to 1000"),
        (entry("a", "read", "x", adapters="perl"), "adapters has the wrong type"),
        (entry("a", "read", "x", adapters=[1]), "adapters has the wrong type"),
        (entry("a", "read", "x") * 2, "the same sha256"),
        ('[[token]]\nname = "a"\nrole = "read"\n', "sha256 is missing"),
        ('[[token]]\nname = "a"\nrole = "read"\nsha256 = "abc"\n', "64 hex digits"),
    ],
)
def test_wrong_file_is_refused_with_what_is_wrong(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(text)
    with pytest.raises(StartupError) as caught:
        read_tokens(path)
    assert problem in caught.value.message


def test_every_entry_is_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = read_tokens(write_tokens(tmp_path / "tokens.toml"))
    compared: list[str] = []
    compare_digest = hmac.compare_digest

    def compare(left: str, right: str) -> bool:
        compared.append(left)
        return compare_digest(left, right)

    monkeypatch.setattr(hmac, "compare_digest", compare, raising=True)
    for secret in (*SECRETS.values(), "unknown"):
        compared.clear()
        Tokens.find(found, secret)
        assert compared == [entry.sha256 for entry in found.entries]


def test_secrets_and_digests_are_in_no_representation() -> None:
    token = Token(name="a", sha256="f" * 64, role=Role.READ)
    assert "ffff" not in repr(token)


def test_bucket_refills_at_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    limits = TokenLimits(lambda: now_s)
    token = Token(name="a", sha256="", role=Role.READ, rate=2.0, burst=3)

    def num_taken() -> int:
        for count in range(100):
            try:
                limits.count_call(token)
            except Exception:
                return count
        return 100

    assert num_taken() == 3
    now_s = 1.0
    assert num_taken() == 2
    now_s = 100.0
    assert num_taken() == 3, "never over the burst"


def test_nobody_is_everybody_without_a_token_file() -> None:
    assert access.Access(None).admit("/fusionserve.v1.AdapterService/LoadAdapter", ()) is access.ANYBODY
    assert access.caller() is access.ANYBODY
