"""Every range of a generation request, at its ends and past them."""

from __future__ import annotations

import math

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from grpc import aio
from server_fixture import Served, requests_total, to_failure

from fusionserve import generation
from fusionserve.errors import InvalidRequestError
from fusionserve.server.generate_params import to_generate_params
from fusionserve.v1 import inference_pb2 as pb

NAN, INF = math.nan, math.inf


def make_request(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"request_id": "r", "text": "a", **fields})


def sampling(**fields: object) -> pb.GenerateRequest:
    return make_request(sampling=pb.SamplingParams(**fields))


def stopping(**fields: object) -> pb.GenerateRequest:
    return make_request(stopping=pb.StoppingCriteria(**fields))


def output(**fields: object) -> pb.GenerateRequest:
    return make_request(output=pb.OutputOptions(**fields))


def adapter(name: str, **fields: float) -> pb.GenerateRequest:
    return make_request(adapter=pb.AdapterSelection(name=name, **fields))


def blend(*members: tuple[str, float]) -> pb.GenerateRequest:
    selected = [pb.BlendMember(name=name, weight=weight) for name, weight in members]
    return make_request(blend=pb.BlendSelection(members=selected))


def fusion(name: str, *excluded: str) -> pb.GenerateRequest:
    return make_request(fusion=pb.FusionSelection(name=name, excluded_members=excluded))


def chat(*roles: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id="r", chat=pb.Chat(messages=[pb.ChatMessage(role=role) for role in roles])
    )


REFUSED = [
    (pb.GenerateRequest(request_id="r"), "prompt", "PROMPT_REQUIRED"),
    (make_request(text=""), "text", "PROMPT_EMPTY"),
    (pb.GenerateRequest(request_id="r", token_ids=pb.TokenIds()), "token_ids.ids", "PROMPT_EMPTY"),
    (chat(), "chat.messages", "PROMPT_EMPTY"),
    (chat("user", ""), "chat.messages[1].role", "LENGTH_OUT_OF_RANGE"),
    (chat(*["user"] * 1025), "chat.messages", "TOO_MANY_MESSAGES"),
    (make_request(request_id=""), "request_id", "REQUEST_ID_INVALID"),
    (make_request(request_id="x" * 129), "request_id", "REQUEST_ID_INVALID"),
    (make_request(request_id="a\nb"), "request_id", "REQUEST_ID_INVALID"),
    (make_request(request_id="é"), "request_id", "REQUEST_ID_INVALID"),
    (make_request(num_candidates=0), "num_candidates", "OUT_OF_RANGE"),
    (make_request(num_candidates=10**6), "num_candidates", "OUT_OF_RANGE"),
    (make_request(priority=1001), "priority", "OUT_OF_RANGE"),
    (make_request(cache_salt="s" * 257), "cache_salt", "LENGTH_OUT_OF_RANGE"),
    (sampling(temperature=NAN), "sampling.temperature", "NOT_FINITE"),
    (sampling(temperature=INF), "sampling.temperature", "NOT_FINITE"),
    (sampling(temperature=-INF), "sampling.temperature", "NOT_FINITE"),
    (sampling(temperature=-0.1), "sampling.temperature", "OUT_OF_RANGE"),
    (sampling(temperature=101), "sampling.temperature", "OUT_OF_RANGE"),
    (sampling(top_p=0), "sampling.top_p", "OUT_OF_RANGE"),
    (sampling(top_p=1.1), "sampling.top_p", "OUT_OF_RANGE"),
    (sampling(top_p=NAN), "sampling.top_p", "NOT_FINITE"),
    (sampling(min_p=-0.1), "sampling.min_p", "OUT_OF_RANGE"),
    (sampling(min_p=1.1), "sampling.min_p", "OUT_OF_RANGE"),
    (sampling(min_p=NAN), "sampling.min_p", "NOT_FINITE"),
    (sampling(repetition_penalty=0), "sampling.repetition_penalty", "OUT_OF_RANGE"),
    (sampling(repetition_penalty=INF), "sampling.repetition_penalty", "NOT_FINITE"),
    (sampling(presence_penalty=-101), "sampling.presence_penalty", "OUT_OF_RANGE"),
    (sampling(frequency_penalty=NAN), "sampling.frequency_penalty", "NOT_FINITE"),
    (sampling(logit_bias={7: NAN}), "sampling.logit_bias[7]", "NOT_FINITE"),
    (sampling(logit_bias={7: 101}), "sampling.logit_bias[7]", "OUT_OF_RANGE"),
    (sampling(logit_bias=dict.fromkeys(range(50_000), 0)), "sampling.logit_bias", "TOO_MANY_LOGIT_BIASES"),
    (stopping(max_new_tokens=0), "stopping.max_new_tokens", "OUT_OF_RANGE"),
    (stopping(max_new_tokens=2, min_new_tokens=3), "stopping.min_new_tokens", "OUT_OF_RANGE"),
    (stopping(stop=["x"] * 100_000), "stopping.stop", "TOO_MANY_STOPS"),
    (stopping(stop=["x", ""]), "stopping.stop[1]", "LENGTH_OUT_OF_RANGE"),
    (stopping(stop=["x" * (1 << 20)]), "stopping.stop[0]", "LENGTH_OUT_OF_RANGE"),
    (stopping(stop_token_ids=range(10_000)), "stopping.stop_token_ids", "TOO_MANY_STOPS"),
    (stopping(time_limit=Duration()), "stopping.time_limit", "OUT_OF_RANGE"),
    (stopping(time_limit=Duration(seconds=-1)), "stopping.time_limit", "OUT_OF_RANGE"),
    (output(logprobs=10**6), "output.logprobs", "OUT_OF_RANGE"),
    (output(prompt_logprobs=21), "output.prompt_logprobs", "OUT_OF_RANGE"),
    (output(stream_interval=0), "output.stream_interval", "OUT_OF_RANGE"),
    (output(stream_interval=1025), "output.stream_interval", "OUT_OF_RANGE"),
    (adapter(""), "adapter.name", "ADAPTER_ID_INVALID"),
    *(
        (adapter(name), "adapter.name", "ADAPTER_ID_INVALID")
        for name in ("../x", "/etc", ".", "..", "~", "A")
    ),
    *((adapter(name), "adapter.name", "ADAPTER_ID_INVALID") for name in ("a..b", "%2e%2e", "x" * 64, "a\n")),
    *((adapter(name), "adapter.name", "ADAPTER_ID_INVALID") for name in ("base", "other")),
    (blend(("a", 1), ("base", 1)), "blend.members[1].name", "ADAPTER_ID_INVALID"),
    (fusion("other"), "fusion.name", "FUSION_ID_INVALID"),
    (fusion("mix", "base"), "fusion.excluded_members[0]", "ADAPTER_ID_INVALID"),
    (adapter("a", scale=NAN), "adapter.scale", "NOT_FINITE"),
    (adapter("a", scale=-101), "adapter.scale", "OUT_OF_RANGE"),
    (blend(), "blend.members", "BLEND_EMPTY"),
    (blend(("a", 0), ("b", 0)), "blend.members", "BLEND_EMPTY"),
    (blend(("a", 1), ("a", 1)), "blend.members", "MEMBER_DUPLICATE"),
    (blend(("a", 1), ("b", NAN)), "blend.members[1].weight", "NOT_FINITE"),
    (blend(("a", 1), ("", 1)), "blend.members[1].name", "ADAPTER_ID_INVALID"),
    (fusion("../x"), "fusion.name", "FUSION_ID_INVALID"),
    (fusion("mix", "a", ""), "fusion.excluded_members[1]", "ADAPTER_ID_INVALID"),
    (fusion("mix", "a", "a"), "fusion.excluded_members", "MEMBER_DUPLICATE"),
    (fusion("mix", *(f"a{index}" for index in range(65))), "fusion.excluded_members", "TOO_MANY_MEMBERS"),
    (output(fusion_weights=1), "output.fusion_weights", "FUSION_REQUIRED"),
    (output(fusion_weights=9), "output.fusion_weights", "OUT_OF_RANGE"),
    (blend(*((f"a{index}", 1) for index in range(1000))), "blend.members", "TOO_MANY_MEMBERS"),
]

ACCEPTED = [
    sampling(temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=100, seed=-(2**63)),
    sampling(repetition_penalty=1 / 128),
    sampling(temperature=100, top_k=2**32 - 1, top_p=1e-9, min_p=1, presence_penalty=-100),
    sampling(logit_bias=dict.fromkeys(range(1024), -100.0)),
    stopping(max_new_tokens=1, min_new_tokens=1, stop=["x" * 256] * 16, stop_token_ids=range(64)),
    stopping(max_new_tokens=2**32 - 1, time_limit=Duration(nanos=1)),
    output(logprobs=20, prompt_logprobs=0, stream_interval=1024),
    make_request(request_id="x" * 128, num_candidates=16, priority=-1000, cache_salt="s" * 256),
    adapter("a" * 63, scale=-100),
    adapter("0.a_b-c", scale=0),
    blend(*((f"a{index}", 100) for index in range(16))),
    chat(*["user"] * 1024),
    fusion("mix", *(f"a{index}" for index in range(64))),
]


@pytest.mark.parametrize(("request_", "field", "reason"), REFUSED, ids=lambda value: str(value)[:40])
def test_value_out_of_range_is_refused_by_name(request_: pb.GenerateRequest, field: str, reason: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        to_generate_params(request_, deadline_s=0)
    assert (caught.value.field, caught.value.reason) == (field, reason)


@pytest.mark.parametrize("request_", ACCEPTED, ids=lambda value: str(value)[:40])
def test_value_at_the_end_of_its_range_is_accepted(request_: pb.GenerateRequest) -> None:
    params = to_generate_params(request_, deadline_s=0)
    assert params != to_generate_params(make_request(), deadline_s=0), "it is taken as it is, not as unset"


def test_unset_fields_take_the_documented_defaults() -> None:
    assert to_generate_params(make_request(), deadline_s=5.0) == generation.GenerateParams(
        request_id="r", prompt=generation.TextPrompt("a"), deadline_s=5.0
    )


def test_set_zeros_differ_from_unset() -> None:
    params = to_generate_params(
        make_request(
            sampling=pb.SamplingParams(temperature=0, seed=0),
            output=pb.OutputOptions(logprobs=0),
            adapter=pb.AdapterSelection(name="a", scale=0),
        ),
        deadline_s=0,
    )
    assert params.sampling == generation.SamplingParams(temperature=0, seed=0)
    assert params.output == generation.OutputOptions(logprobs=0)
    assert params.adaptation.terms == (generation.AdapterTerm("a", 0),)


def test_every_field_arrives() -> None:
    params = to_generate_params(
        make_request(
            sampling=pb.SamplingParams(top_k=3, min_p=0.5, repetition_penalty=2, logit_bias={9: -1}),
            stopping=pb.StoppingCriteria(
                max_new_tokens=9,
                min_new_tokens=2,
                stop=["x"],
                stop_token_ids=[4],
                include_stop=True,
                ignore_eos=True,
                time_limit=Duration(seconds=1, nanos=500_000_000),
            ),
            num_candidates=2,
            priority=-3,
            cache_salt="tenant",
        ),
        deadline_s=0,
    )
    expected = generation.SamplingParams(top_k=3, min_p=0.5, repetition_penalty=2, logit_bias={9: -1})
    assert params.sampling == expected
    assert params.stopping == generation.StoppingCriteria(
        max_new_tokens=9,
        min_new_tokens=2,
        stop=("x",),
        stop_token_ids=(4,),
        include_stop=True,
        ignore_eos=True,
        time_limit_s=1.5,
    )
    assert (params.num_candidates, params.priority, params.cache_salt) == (2, -3, "tenant")


@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
async def test_refusal_names_field_and_reason_to_the_client(served: Served, method: str) -> None:
    before = requests_total("base", "none", "INVALID_ARGUMENT")
    request: Message = sampling(temperature=NAN)
    if method == "StreamGenerate":
        request = pb.StreamGenerateRequest(request=request)
    call = getattr(served.inference, method)(request)
    with pytest.raises(aio.AioRpcError) as caught:
        await (call if method == "Generate" else call.read())
    failure = to_failure(caught.value)
    assert failure.code.name == "INVALID_ARGUMENT"
    assert (failure.field, failure.reason) == ("sampling.temperature", "NOT_FINITE")
    assert failure.trailers["x-request-id"] == "r"
    assert not served.engine.params
    assert requests_total("base", "none", "INVALID_ARGUMENT") == before + 1


async def test_unknown_fields_are_ignored(served: Served) -> None:
    unknown = b"\xa2\x06\x01x"  # field 100, one byte
    call = served.channel.unary_unary("/fusionserve.v1.InferenceService/Generate")
    data = await call(make_request().SerializeToString() + unknown)
    assert pb.GenerateResponse.FromString(data).request_id == "r"
