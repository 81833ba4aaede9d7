"""The corpus of bad requests: what a wrong or hostile client sends, and the exact answer each must get.

For a server of the embedded model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from fusionserve.v1 import adapter_pb2, inference_pb2
from fusionserve.v1.inference_pb2 import GenerateRequest, SamplingParams, StoppingCriteria

VOCAB, CONTEXT, MODEL = 4096, 1024, "fusionserve-tiny"
NAN, INF = math.nan, math.inf
INFERENCE, ADAPTERS = "/fusionserve.v1.InferenceService/", "/fusionserve.v1.AdapterService/"
GENERATE, STREAM = INFERENCE + "Generate", INFERENCE + "StreamGenerate"


@dataclass(frozen=True)
class Case:
    """`code` and `reason` of the answer; with `field` a BadRequest names it, with `resource` a ResourceInfo does."""

    name: str
    method: str
    request: bytes
    code: str
    reason: str = ""
    field: str = ""
    resource: str = ""


def corpus() -> list[Case]:
    """Every case with its exact answer."""
    return [
        *_malformed(),
        *_prompts(),
        *_sampling(),
        *_stopping(),
        *_output(),
        *_adaptations(),
        *_artifact_names(),
        *_lists_and_texts(),
    ]


def generation(**fields: Any) -> GenerateRequest:
    """A short request that works, but for `fields`."""
    request = GenerateRequest(
        sampling=SamplingParams(temperature=0), stopping=StoppingCriteria(max_new_tokens=2, ignore_eos=True)
    )
    if not fields.keys() & {"text", "token_ids", "chat"}:
        request.text = "The"
    request.MergeFrom(GenerateRequest(**{key: value for key, value in fields.items() if value is not None}))
    return request


def _bad(name: str, request: Message, reason: str, field: str, method: str = GENERATE) -> Case:
    return Case(name, method, request.SerializeToString(), "INVALID_ARGUMENT", reason, field)


def _ids(*ids: int) -> inference_pb2.TokenIds:
    return inference_pb2.TokenIds(ids=ids)


def _malformed() -> Iterator[Case]:
    valid = generation().SerializeToString()
    raw = {
        "garbage": b"\xff\xff\xff\xff",
        "cut short": valid[:-3],
        "length past the end": b"\x12\x7f" + b"abc",
        "text that is not UTF-8": b"\x12\x02\xff\xfe",
        "surrogate in UTF-8": b"\x12\x03\xed\xa0\x80",
        "group without an end": b"\x0b",
        "varint of 11 bytes": b"\x58" + b"\xff" * 10 + b"\x01",
        "field number 0": b"\x00\x01",
    }
    for name, data in raw.items():
        yield Case(name, GENERATE, data, "INVALID_ARGUMENT", "MALFORMED_REQUEST")
        yield Case(
            f"{name}, streamed",
            STREAM,
            b"\x0a" + bytes([len(data)]) + data,
            "INVALID_ARGUMENT",
            "MALFORMED_REQUEST",
        )
    deep = b"\x0b" * 200 + b"\x0c" * 200
    yield Case("groups 200 deep", GENERATE, valid + deep, "INVALID_ARGUMENT", "MALFORMED_REQUEST")
    yield Case("unknown fields", GENERATE, valid + b"\xf8\x3f\x01" + b"\xfa\x3f\x03abc", "OK")
    yield Case("known field of another wire type", GENERATE, valid + b"\x59" + bytes(8), "OK")
    yield Case(
        "over the limit",
        GENERATE,
        b"\x12\x80\x80\x80\x02" + b"a" * (4 << 20),
        "RESOURCE_EXHAUSTED",
        "MESSAGE_TOO_LARGE",
    )
    yield Case("far over the limit", GENERATE, bytes(9 << 20), "RESOURCE_EXHAUSTED")
    yield Case("no such method", INFERENCE + "Obey", b"", "UNIMPLEMENTED", "METHOD_NOT_FOUND")
    yield Case("no such service", "/x.y/z", b"", "UNIMPLEMENTED", "METHOD_NOT_FOUND")


def _prompts() -> Iterator[Case]:
    chat = inference_pb2.Chat
    message = inference_pb2.ChatMessage
    for method, wrap in (
        (GENERATE, lambda r: r),
        (STREAM, lambda r: inference_pb2.StreamGenerateRequest(request=r)),
    ):
        yield _bad(f"nothing {method[-8:]}", wrap(GenerateRequest()), "PROMPT_REQUIRED", "prompt", method)
        yield _bad(f"empty text {method[-8:]}", wrap(generation(text="")), "PROMPT_EMPTY", "text", method)
    yield _bad("no token ids", generation(token_ids=_ids()), "PROMPT_EMPTY", "token_ids.ids")
    yield _bad("no messages", generation(chat=chat()), "PROMPT_EMPTY", "chat.messages")
    yield _bad(
        "a message of nobody",
        generation(chat=chat(messages=[message(content="a")])),
        "LENGTH_OUT_OF_RANGE",
        "chat.messages[0].role",
    )
    yield _bad(
        "too many messages",
        generation(chat=chat(messages=[message(role="user")] * 1025)),
        "TOO_MANY_MESSAGES",
        "chat.messages",
    )
    talk = generation(chat=chat(messages=[message(role="user", content="a")])).SerializeToString()
    yield Case("chat without a template", GENERATE, talk, "FAILED_PRECONDITION", "NO_CHAT_TEMPLATE")
    yield _bad(
        "prompt of the whole context", generation(token_ids=_ids(*[1] * CONTEXT)), "PROMPT_TOO_LONG", "prompt"
    )
    yield _bad("prompt of a megabyte", generation(text="a b " * (1 << 18)), "PROMPT_TOO_LONG", "prompt")
    yield _bad(
        "prompt of a million ids", generation(token_ids=_ids(*[1] * 1_000_000)), "PROMPT_TOO_LONG", "prompt"
    )
    for name, token_id in {"the vocabulary": VOCAB, "all ones": 2**32 - 1}.items():
        yield _bad(
            f"token id {name}", generation(token_ids=_ids(1, token_id)), "TOKEN_OUT_OF_RANGE", "token_ids"
        )
    negative = b"\x1a\x0c\x0a\x0a" + b"\xff" * 9 + b"\x01"
    yield Case("token id -1", GENERATE, negative, "INVALID_ARGUMENT", "TOKEN_OUT_OF_RANGE", "token_ids")
    for request_id in ("", " a", "a ", "a\0b", "ä", "a\nb", "x" * 129, "\u202e"):
        yield _bad(
            f"request id {request_id[:9]!r}",
            generation(request_id=request_id),
            "REQUEST_ID_INVALID",
            "request_id",
        )
    yield _bad("salt of 257", generation(cache_salt="s" * 257), "LENGTH_OUT_OF_RANGE", "cache_salt")
    for priority in (-1001, 1001, -(2**31), 2**31 - 1):
        yield _bad(f"priority {priority}", generation(priority=priority), "OUT_OF_RANGE", "priority")


def _sampling() -> Iterator[Case]:
    wrong = {
        "temperature": {"OUT_OF_RANGE": (-1.0, 100.5, 1e30, -1e-3)},
        "top_p": {"OUT_OF_RANGE": (0.0, 1.1, -0.5)},
        "min_p": {"OUT_OF_RANGE": (-0.1, 1.5)},
        "repetition_penalty": {"OUT_OF_RANGE": (0.0, -1.0, 1e-38, 0.007, 101.0)},
        "presence_penalty": {"OUT_OF_RANGE": (-101.0, 101.0)},
        "frequency_penalty": {"OUT_OF_RANGE": (-101.0, 101.0)},
    }
    for name, by_reason in wrong.items():
        by_reason["NOT_FINITE"] = (NAN, INF, -INF)
        for reason, values in by_reason.items():
            for value in values:
                request = generation(sampling=SamplingParams(**{name: value}))
                yield _bad(f"{name} {value}", request, reason, f"sampling.{name}")
    bias = "sampling.logit_bias"
    yield _bad(
        "bias of a stranger",
        generation(sampling=SamplingParams(logit_bias={VOCAB: 1})),
        "TOKEN_OUT_OF_RANGE",
        bias,
    )
    yield _bad(
        "bias NaN", generation(sampling=SamplingParams(logit_bias={5: NAN})), "NOT_FINITE", f"{bias}[5]"
    )
    yield _bad(
        "bias 101", generation(sampling=SamplingParams(logit_bias={5: 101})), "OUT_OF_RANGE", f"{bias}[5]"
    )
    many = SamplingParams(logit_bias=dict.fromkeys(range(50_000), 1.0))
    yield _bad("50,000 biases", generation(sampling=many), "TOO_MANY_LOGIT_BIASES", bias)
    for name, value in {
        "top_k": 2**32 - 1,
        "seed": -(2**63),
        "temperature": 1e-30,
        "top_p": 1e-30,
        "min_p": 1.0,
    }.items():
        fine = generation(sampling=SamplingParams(**{name: value}))
        yield Case(f"{name} {value}", GENERATE, fine.SerializeToString(), "OK")


def _stopping() -> Iterator[Case]:
    def stop(name: str, reason: str, field: str, **fields: Any) -> Case:
        return _bad(name, generation(stopping=StoppingCriteria(**fields)), reason, f"stopping.{field}")

    yield stop("no new tokens", "OUT_OF_RANGE", "max_new_tokens", max_new_tokens=0)
    for number in (CONTEXT, 2**31, 2**32 - 1):
        yield stop(f"{number} new tokens", "CONTEXT_EXCEEDED", "max_new_tokens", max_new_tokens=number)
    yield stop("more at least than at most", "OUT_OF_RANGE", "min_new_tokens", min_new_tokens=3)
    yield stop("all ones at least", "OUT_OF_RANGE", "min_new_tokens", min_new_tokens=2**32 - 1)
    yield stop("100,000 stops", "TOO_MANY_STOPS", "stop", stop=["x"] * 100_000)
    yield stop("17 stops", "TOO_MANY_STOPS", "stop", stop=["x"] * 17)
    yield stop("an empty stop", "LENGTH_OUT_OF_RANGE", "stop[1]", stop=["x", ""])
    yield stop("a stop of a megabyte", "LENGTH_OUT_OF_RANGE", "stop[0]", stop=["x" * (1 << 20)])
    yield stop("10,000 stop ids", "TOO_MANY_STOPS", "stop_token_ids", stop_token_ids=range(10_000))
    yield stop("a stop id of no token", "TOKEN_OUT_OF_RANGE", "stop_token_ids", stop_token_ids=[VOCAB])
    for seconds, nanos in ((0, 0), (-1, 0), (0, -1), (-(2**63), 0), (0, -(2**31)), (1, -2_000_000_000)):
        limit = {"seconds": seconds, "nanos": nanos}
        yield stop(f"time limit {seconds}.{nanos}", "OUT_OF_RANGE", "time_limit", time_limit=limit)
    for number in (0, 17, 10**6, 2**32 - 1):
        yield _bad(
            f"{number} candidates", generation(num_candidates=number), "OUT_OF_RANGE", "num_candidates"
        )
    endless = generation(stopping=StoppingCriteria(time_limit={"seconds": 2**63 - 1, "nanos": 2**31 - 1}))
    yield Case("time limit without end", GENERATE, endless.SerializeToString(), "OK")


def _output() -> Iterator[Case]:
    options = inference_pb2.OutputOptions
    numbers = {"logprobs": (21,), "prompt_logprobs": (21,), "stream_interval": (0, 1025)}
    for name, bad in numbers.items():
        for number in (*bad, 10**6, 2**32 - 1):
            yield _bad(
                f"{name} {number}",
                generation(output=options(**{name: number})),
                "OUT_OF_RANGE",
                f"output.{name}",
            )
    field = "output.fusion_weights"
    for number in (4, 99, -1, 2**31 - 1, -(2**31)):
        yield _bad(
            f"fusion weights {number}",
            generation(output=options(fusion_weights=number)),
            "OUT_OF_RANGE",
            field,
        )  # type: ignore[arg-type]
    yield _bad(
        "fusion weights of no fusion", generation(output=options(fusion_weights=1)), "FUSION_REQUIRED", field
    )  # type: ignore[arg-type]


NAMES = (
    *(
        "",
        ".",
        "..",
        "../x",
        "/etc",
        "a/../../b",
        "a/b",
        "~",
        "%2e%2e",
        "..%2f",
        "a..b",
        "A",
        "perl ",
        " perl",
        "perl\0",
    ),
    *(
        "perl\n",
        "pérl",
        "perl\u200b",
        "\u202elrep",
        "ｐｅｒｌ",
        "perl\u0301",
        "😀",
        "x" * 64,
        "-a",
        "_a",
        ".a",
        "a\\b",
        "a:b",
        "$(id)",
    ),
)


def _adaptations() -> Iterator[Case]:
    select, member = inference_pb2.AdapterSelection, inference_pb2.BlendMember
    blend, fusion = inference_pb2.BlendSelection, inference_pb2.FusionSelection
    for name in NAMES:
        shown = name[:12].encode("ascii", "backslashreplace").decode()
        yield _bad(
            f"adapter {shown}", generation(adapter=select(name=name)), "ADAPTER_ID_INVALID", "adapter.name"
        )
        yield _bad(
            f"fusion {shown}", generation(fusion=fusion(name=name)), "FUSION_ID_INVALID", "fusion.name"
        )
        among = blend(members=[member(name="perl", weight=1), member(name=name, weight=1)])
        yield _bad(f"member {shown}", generation(blend=among), "ADAPTER_ID_INVALID", "blend.members[1].name")
    yield _bad(
        "adapter of the base's name",
        generation(adapter=select(name=MODEL)),
        "ADAPTER_ID_INVALID",
        "adapter.name",
    )
    yield _bad(
        "fusion of the base's name", generation(fusion=fusion(name=MODEL)), "FUSION_ID_INVALID", "fusion.name"
    )
    for scale, reason in (
        (NAN, "NOT_FINITE"),
        (INF, "NOT_FINITE"),
        (101, "OUT_OF_RANGE"),
        (-101, "OUT_OF_RANGE"),
    ):
        yield _bad(
            f"scale {scale}", generation(adapter=select(name="perl", scale=scale)), reason, "adapter.scale"
        )
        one = blend(members=[member(name="perl", weight=scale)])
        yield _bad(f"weight {scale}", generation(blend=one), reason, "blend.members[0].weight")
    for name, members, reason in (
        ("no members", [], "BLEND_EMPTY"),
        ("weights of zero", [member(name="perl"), member(name="cpp")], "BLEND_EMPTY"),
        ("a member twice", [member(name="perl", weight=1)] * 2, "MEMBER_DUPLICATE"),
        ("17 members", [member(name=f"m{n}", weight=1) for n in range(17)], "TOO_MANY_MEMBERS"),
    ):
        yield _bad(name, generation(blend=blend(members=members)), reason, "blend.members")
    for name, excluded, reason in (
        ("a stranger left out", ["stranger"], "UNKNOWN_MEMBER"),
        ("one left out twice", ["perl", "perl"], "MEMBER_DUPLICATE"),
        ("all left out", ["changelog", "cpp", "perl", "polish", "spanish"], "NO_MEMBER_LEFT"),
        ("1,000 left out", [f"m{n}" for n in range(1000)], "TOO_MANY_MEMBERS"),
    ):
        chosen = fusion(name="domains", excluded_members=excluded)
        yield _bad(name, generation(fusion=chosen), reason, "fusion.excluded_members")
    for name, request, reason in (
        ("unknown adapter", generation(adapter=select(name="nobody")), "ADAPTER_NOT_FOUND"),
        (
            "unknown member",
            generation(blend=blend(members=[member(name="nobody", weight=1)])),
            "ADAPTER_NOT_FOUND",
        ),
        ("unknown fusion", generation(fusion=fusion(name="nobody")), "FUSION_NOT_FOUND"),
        ("a fusion as an adapter", generation(adapter=select(name="domains")), "ADAPTER_NOT_FOUND"),
        ("an adapter as a fusion", generation(fusion=fusion(name="perl")), "FUSION_NOT_FOUND"),
    ):
        kind = "fusion" if reason.startswith("FUSION") else "adapter"
        yield Case(name, GENERATE, request.SerializeToString(), "NOT_FOUND", reason, resource=kind)


PATHS = (
    "..",
    "/",
    "/etc",
    "a/../b",
    "./a",
    "a//b",
    "",
    "a/",
    "~/a\0",
    "a\\b",
    "a\nb",
    "x" * 1025,
    "\u2028",
    "/".join("x" * 17),
)


def _artifact_names() -> Iterator[Case]:
    for noun, kind in (("Adapter", "adapter"), ("Fusion", "fusion")):
        reason = kind.upper()
        for verb in ("Load", "Unload", "Get"):
            make = getattr(adapter_pb2, f"{verb}{noun}Request")
            method = f"{ADAPTERS}{verb}{noun}"
            for name in NAMES:
                shown = name[:12].encode("ascii", "backslashreplace").decode()
                yield _bad(f"{verb} {kind} {shown}", make(name=name), f"{reason}_ID_INVALID", "name", method)
            missing = f"{reason}_NOT_LOADED" if verb == "Unload" else f"{reason}_NOT_FOUND"
            request = make(name="nobody").SerializeToString()
            yield Case(f"{verb} unknown {kind}", method, request, "NOT_FOUND", missing, resource=kind)
        load = getattr(adapter_pb2, f"Load{noun}Request")
        yield _bad(
            f"load {kind} of the base's name",
            load(name=MODEL),
            f"{reason}_ID_INVALID",
            "name",
            f"{ADAPTERS}Load{noun}",
        )
        for path in PATHS:
            request = load(name="a", path=path)
            yield _bad(
                f"{kind} path {path[:9]!r}",
                request,
                f"{reason}_PATH_INVALID",
                "path",
                f"{ADAPTERS}Load{noun}",
            )


def _lists_and_texts() -> Iterator[Case]:
    for noun in ("Adapters", "Fusions"):
        make = getattr(adapter_pb2, f"List{noun}Request")
        for token in ("x", "%%%", "Li4=", "a" * 10_000, "\0"):
            yield _bad(
                f"{noun} page {token[:5]!r}",
                make(page_token=token),
                "PAGE_TOKEN_INVALID",
                "page_token",
                f"{ADAPTERS}List{noun}",
            )
        yield Case(
            f"{noun} all at once",
            f"{ADAPTERS}List{noun}",
            make(page_size=2**32 - 1).SerializeToString(),
            "OK",
        )
    tokenize, detokenize = inference_pb2.TokenizeRequest, inference_pb2.DetokenizeRequest
    yield _bad("tokenize nothing", tokenize(), "PROMPT_REQUIRED", "input", INFERENCE + "Tokenize")
    yield _bad(
        "detokenize a stranger",
        detokenize(token_ids=[VOCAB]),
        "TOKEN_OUT_OF_RANGE",
        "token_ids",
        INFERENCE + "Detokenize",
    )
    yield _bad(
        "detokenize more than the context holds",
        detokenize(token_ids=[1] * (1 << 20)),
        "TOO_MANY_TOKENS",
        "token_ids",
        INFERENCE + "Detokenize",
    )
    yield Case("detokenize nothing", INFERENCE + "Detokenize", b"", "OK")
    yield Case("tokenize NULs", INFERENCE + "Tokenize", tokenize(text="\0" * 1000).SerializeToString(), "OK")
