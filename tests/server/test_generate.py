"""Generate, StreamGenerate and their neighbours, from the client's side."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest
from fake_engine import MODEL_NAME
from grpc import aio
from server_fixture import INFERENCE, Served, handled_total, requests_total, to_failure

from fusionserve import __version__
from fusionserve.generation import (
    Adaptation,
    AdapterTerm,
    ChatPrompt,
    GenerationChunk,
    GenerationEvent,
    GenerationFinished,
    TextPrompt,
    TokenFusionWeights,
    TokenLogprob,
    TokenLogprobs,
    TokenPrompt,
)
from fusionserve.server import inference_servicer
from fusionserve.server.generate_response import to_stream_response
from fusionserve.v1 import inference_pb2 as pb

ADAPTATIONS = {
    "base": {},
    "lora": {"adapter": pb.AdapterSelection(name="alpha", scale=0.5)},
    "blend": {
        "blend": pb.BlendSelection(
            members=[pb.BlendMember(name="alpha", weight=0.25), pb.BlendMember(name="beta", weight=-1)]
        )
    },
}


async def test_generate_answers_with_the_whole_result(served: Served) -> None:
    response = await served.inference.Generate(
        pb.GenerateRequest(request_id="mine", text="abc", num_candidates=2)
    )
    assert response.request_id == "mine"
    assert [candidate.text for candidate in response.candidates] == ["base0 base1 base2 base3 "] * 2
    assert [candidate.index for candidate in response.candidates] == [0, 1]
    assert response.candidates[0].finish_reason == pb.FINISH_REASON_LENGTH
    assert not response.candidates[0].HasField("stop_token_id")
    assert response.usage == pb.Usage(prompt_tokens=3, generated_tokens=8)
    assert response.timings.total.nanos == 3_000_000
    assert response.timings.time_to_first_token.nanos == 2_000_000


@pytest.mark.parametrize("kind", ADAPTATIONS)
async def test_adaptation_reaches_the_engine_and_comes_back_resolved(served: Served, kind: str) -> None:
    before = requests_total(kind, "length", "OK")
    response = await served.inference.Generate(pb.GenerateRequest(text="a", **ADAPTATIONS[kind]))
    assert response.adaptation.kind == kind
    assert served.engine.params[0].adaptation.kind == kind
    terms = served.engine.params[0].adaptation.terms
    assert [(member.name, member.weight) for member in response.adaptation.members] == [
        (term.name, term.scale) for term in terms
    ]
    if kind == "lora":
        assert terms == (AdapterTerm("alpha", 0.5),)
        assert (response.adaptation.name, response.adaptation.version) == ("alpha", 1)
        assert response.adaptation.digest == "digest-of-alpha"
    assert requests_total(kind, "length", "OK") == before + 1


async def test_fusion_comes_back_resolved_with_its_weights(served: Served) -> None:
    request = pb.GenerateRequest(
        text="a",
        fusion=pb.FusionSelection(name="mix", excluded_members=["beta"]),
        output=pb.OutputOptions(fusion_weights=pb.FUSION_WEIGHT_DETAIL_PER_TOKEN),
    )
    before = requests_total("fusion", "length", "OK")
    stream = served.inference.StreamGenerate(pb.StreamGenerateRequest(request=request))
    events = [event async for event in stream]
    assert served.engine.params[0].adaptation == Adaptation(
        kind="fusion", fusion="mix", excluded_members=("beta",)
    )
    assert events[1].chunk.fusion_weights == [pb.TokenWeights(position=0, weights=[0.75, 0.25])]
    finished = events[-1].finished
    adaptation = finished.adaptation
    assert (adaptation.kind, adaptation.name, adaptation.version) == ("fusion", "mix", 1)
    assert adaptation.digest == "digest-of-mix"
    assert [(member.name, member.weight) for member in adaptation.members] == [("alpha", 1), ("beta", 0)]
    assert finished.fusion_weights == pb.FusionWeights(
        members=["alpha", "beta"],
        mean=[0.75, 0.25],
        tokens=[pb.TokenWeights(position=0, weights=[0.75, 0.25])],
    )
    assert requests_total("fusion", "length", "OK") == before + 1


async def test_fusion_weights_by_module_and_none(served: Served) -> None:
    request = pb.GenerateRequest(text="a", fusion=pb.FusionSelection(name="mix"))
    assert not (await served.inference.Generate(request)).HasField("fusion_weights")
    request.output.fusion_weights = pb.FUSION_WEIGHT_DETAIL_PER_MODULE
    (module,) = (await served.inference.Generate(request)).fusion_weights.modules
    assert module == pb.ModuleWeights(module="layers.0.q_proj", weights=[0.5, 0.5])


async def test_stream_is_started_chunks_finished(served: Served) -> None:
    request = pb.GenerateRequest(text="abc", output=pb.OutputOptions(logprobs=2))
    whole = await served.inference.Generate(request)
    stream = served.inference.StreamGenerate(pb.StreamGenerateRequest(request=request))
    events = [event async for event in stream]
    assert [event.WhichOneof("event") for event in events] == ["started", *["chunk"] * 4, "finished"]
    assert "".join(event.chunk.text for event in events) == whole.candidates[0].text
    assert events[0].started.usage.prompt_tokens == 3
    assert events[1].chunk.logprobs[0].top[1].token_id == 1
    finished = events[-1].finished
    assert finished.candidates == whole.candidates
    assert events[0].started.request_id == finished.request_id
    assert finished.request_id == dict(await stream.trailing_metadata())["x-request-id"]
    assert handled_total(INFERENCE, "StreamGenerate", "OK", "server_stream") > 0


@pytest.mark.parametrize(("num_tokens", "is_large"), [(10, False), (100, True)])
async def test_large_answer_is_built_beside_the_event_loop(
    served: Served, num_tokens: int, is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[bool] = []

    def noting(build: Callable[[object], object], event: object) -> object:
        if isinstance(event, GenerationFinished):
            threads.append(threading.current_thread() is not threading.main_thread())
        return build(event)

    for name in ("to_generate_response", "to_stream_response"):
        monkeypatch.setattr(inference_servicer, name, partial(noting, getattr(inference_servicer, name)))
    request = pb.GenerateRequest(
        text="a",
        stopping=pb.StoppingCriteria(max_new_tokens=num_tokens),
        output=pb.OutputOptions(logprobs=1),
    )
    whole = await served.inference.Generate(request)
    assert len(whole.candidates[0].logprobs) == num_tokens
    *_, last = [
        event async for event in served.inference.StreamGenerate(pb.StreamGenerateRequest(request=request))
    ]
    assert len(last.finished.candidates[0].logprobs) == num_tokens
    assert threads == [is_large, is_large]


@pytest.mark.parametrize("field", ["logprobs", "fusion_weights"])
@pytest.mark.parametrize(("num_entries", "is_large"), [(10, False), (100, True)])
async def test_large_chunk_is_built_beside_the_event_loop(
    field: str, num_entries: int, is_large: bool
) -> None:
    entry = TokenLogprobs(TokenLogprob(1, "a", -1.0, 1), ()) if field == "logprobs" else None
    entries = (entry or TokenFusionWeights(0, (0.5, 0.5)),) * num_entries
    chunk = GenerationChunk(candidate_index=0, text="", token_ids=(1,), **{field: entries})
    threads: list[threading.Thread] = []

    def noting(event: GenerationEvent) -> pb.StreamGenerateResponse:
        threads.append(threading.current_thread())
        return to_stream_response(event)

    built = await inference_servicer._built(noting, chunk)
    assert len(getattr(built.chunk, field)) == num_entries
    assert (threads[0] is not threading.main_thread()) is is_large


async def test_request_id_is_minted_and_told_in_the_trailers(served: Served) -> None:
    call = served.inference.Generate(pb.GenerateRequest(text="a"))
    response = await call
    assert len(response.request_id) == 32
    assert dict(await call.trailing_metadata())["x-request-id"] == response.request_id


async def test_prompts_arrive_as_they_were_sent(served: Served) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi"), pb.ChatMessage(role="assistant")])
    await served.inference.Generate(pb.GenerateRequest(text="a\0b"))
    await served.inference.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 0, 2**32 - 1])))
    await served.inference.Generate(pb.GenerateRequest(chat=chat))
    assert [params.prompt for params in served.engine.params] == [
        TextPrompt("a\0b"),
        TokenPrompt((5, 0, 2**32 - 1)),
        ChatPrompt((("user", "hi"), ("assistant", ""))),
    ]


async def test_unknown_adapter_is_not_found(served: Served) -> None:
    before = requests_total("lora", "none", "NOT_FOUND")
    with pytest.raises(aio.AioRpcError) as caught:
        await served.inference.Generate(
            pb.GenerateRequest(text="a", adapter=pb.AdapterSelection(name="gamma"))
        )
    failure = to_failure(caught.value)
    assert failure.code.name == "NOT_FOUND"
    assert failure.reason == "ADAPTER_NOT_FOUND"
    assert failure.details["ResourceInfo"].resource_name == "gamma"
    assert requests_total("lora", "none", "NOT_FOUND") == before + 1


async def test_tokenize_and_detokenize(served: Served) -> None:
    tokens = await served.inference.Tokenize(pb.TokenizeRequest(text="abc"))
    assert list(tokens.token_ids) == [0, 97, 98, 99]
    plain = await served.inference.Tokenize(pb.TokenizeRequest(text="abc", add_special_tokens=False))
    assert list(plain.token_ids) == [97, 98, 99]
    chat = pb.Chat(messages=[pb.ChatMessage(role="u", content="b")])
    assert list((await served.inference.Tokenize(pb.TokenizeRequest(chat=chat))).token_ids) == [0, 117, 98]
    text = await served.inference.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids))
    assert text.text == "abc"
    request = pb.DetokenizeRequest(token_ids=[0, 97], skip_special_tokens=False)
    assert (await served.inference.Detokenize(request)).text == "\0a"


async def test_tokenize_needs_an_input(served: Served) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await served.inference.Tokenize(pb.TokenizeRequest())
    assert to_failure(caught.value).reason == "PROMPT_REQUIRED"


async def test_get_model_describes_model_and_limits(served: Served) -> None:
    model = await served.inference.GetModel(pb.GetModelRequest())
    assert (model.name, model.version, model.quantization) == (MODEL_NAME, __version__, "none")
    assert (model.architecture, model.dtype, model.weight_bytes) == ("FakeForCausalLM", "float32", 5 << 30)
    assert (model.max_context_tokens, model.vocab_size) == (512, 256)
    assert list(model.eos_token_ids) == [0, 7]
    assert (model.has_tokenizer, model.has_chat_template) == (True, False)
    assert model.limits == pb.ServerLimits(
        max_batch_tokens=128,
        max_batch_requests=8,
        adapter_pool_ranks=64,
        max_adapter_rank=32,
        adapter_host_bytes=1 << 33,
    )
