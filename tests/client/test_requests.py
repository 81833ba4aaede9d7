"""Requests built from plain values."""

import pytest

from fusionserve.client.requests import GenerateOptions, to_generate_request, to_tokenize_request
from fusionserve.v1.inference_pb2 import (
    FusionWeightDetail,
    GenerateRequest,
    OutputOptions,
    SamplingParams,
    StoppingCriteria,
)

GROUPS = {"sampling", "stopping", "output"}


def test_options_cover_every_field_of_the_api() -> None:
    fields = {
        field.name
        for message in (GenerateRequest, SamplingParams, StoppingCriteria, OutputOptions)
        for field in message.DESCRIPTOR.fields
    }
    prompts = {"text", "token_ids", "chat"}
    renamed = {"time_limit": "time_limit_s"}
    expected = {renamed.get(name, name) for name in fields - GROUPS - prompts} | {"scale", "excluded_members"}
    assert GenerateOptions.__annotations__.keys() == expected


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("hello", "text"),
        ([1, 2], "token_ids"),
        ((), "token_ids"),
        ([{"role": "user", "content": "hi"}], "chat"),
    ],
)
def test_prompt_kind_follows_its_type(prompt: object, kind: str) -> None:
    assert to_generate_request(prompt, {}).WhichOneof("prompt") == kind  # type: ignore[arg-type]


def test_missing_and_none_options_stay_unset_and_zero_is_sent() -> None:
    request = to_generate_request("x", {"temperature": 0.0, "top_k": None, "adapter": None})
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_k")
    assert request.WhichOneof("adaptation") is None
    assert not request.stopping.HasField("time_limit")


def test_every_option_reaches_its_field() -> None:
    request = to_generate_request(
        "x",
        {
            "blend": {"a": 0.25, "b": 0.5},
            "seed": -3,
            "logit_bias": {7: -1.5},
            "stop": "end",
            "stop_token_ids": [5],
            "ignore_eos": True,
            "time_limit_s": 1.5,
            "logprobs": 0,
            "num_candidates": 2,
            "cache_salt": "tenant",
        },
    )
    assert [(member.name, member.weight) for member in request.blend.members] == [("a", 0.25), ("b", 0.5)]
    assert (request.sampling.seed, dict(request.sampling.logit_bias)) == (-3, {7: -1.5})
    assert (list(request.stopping.stop), list(request.stopping.stop_token_ids)) == (["end"], [5])
    assert request.stopping.time_limit.ToMilliseconds() == 1500
    assert request.stopping.ignore_eos
    assert request.output.HasField("logprobs")
    assert (request.num_candidates, request.cache_salt) == (2, "tenant")


def test_adapter_scale_may_be_unset() -> None:
    assert not to_generate_request("x", {"adapter": "a"}).adapter.HasField("scale")
    assert to_generate_request("x", {"adapter": "a", "scale": 0.0}).adapter.HasField("scale")


@pytest.mark.parametrize(
    "options",
    [
        {"adapter": "a", "blend": {"b": 1.0}},
        {"adapter": "a", "fusion": "mix"},
        {"scale": 1.0, "fusion": "mix"},
    ],
)
def test_contradicting_options_are_refused(options: GenerateOptions) -> None:
    with pytest.raises(ValueError, match="adapter"):
        to_generate_request("x", options)


def test_fusion_options_reach_their_fields() -> None:
    request = to_generate_request(
        "x", {"fusion": "mix", "excluded_members": ["a"], "fusion_weights": "per_token"}
    )
    assert (request.fusion.name, list(request.fusion.excluded_members)) == ("mix", ["a"])
    assert request.output.fusion_weights == FusionWeightDetail.FUSION_WEIGHT_DETAIL_PER_TOKEN


@pytest.mark.parametrize("options", [{"excluded_members": ["a"]}, {"fusion": "m", "fusion_weights": "all"}])
def test_impossible_fusion_options_are_refused(options: GenerateOptions) -> None:
    with pytest.raises(ValueError, match="fusion"):
        to_generate_request("x", options)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        to_generate_request("x", {"temprature": 1.0})  # type: ignore[typeddict-unknown-key]


def test_tokenize_takes_text_and_chat() -> None:
    assert to_tokenize_request("x", False).WhichOneof("input") == "text"
    assert to_tokenize_request([{"role": "user", "content": "x"}], True).WhichOneof("input") == "chat"
