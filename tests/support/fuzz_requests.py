"""What must hold of any bytes that a client sends as a request; `tools/fuzz_requests.py` makes the bytes."""

from __future__ import annotations

import math
import re
from typing import Any

from google.protobuf.message import DecodeError

from fusionserve import limits
from fusionserve.adapter_status import AdapterState, AdapterStatus, Residency
from fusionserve.engine.admission import Admission
from fusionserve.engine.tokenizer import Tokenizer
from fusionserve.errors import FusionServeError, InvalidRequestError
from fusionserve.generation import GenerateParams, TokenPrompt
from fusionserve.limits import is_name
from fusionserve.server import checks
from fusionserve.server.adapter_page import to_page
from fusionserve.server.generate_params import to_generate_params
from fusionserve.server.request_ids import request_id_of
from fusionserve.server.status import to_status, to_trailers
from fusionserve.v1 import adapter_pb2, inference_pb2

VOCAB, CONTEXT, MODEL = 4096, 1024, "tiny"
MAX_TRAILER_BYTES = 8 << 10
REQUESTS: tuple[type[Any], ...] = (
    inference_pb2.GenerateRequest,
    inference_pb2.StreamGenerateRequest,
    inference_pb2.TokenizeRequest,
    inference_pb2.DetokenizeRequest,
    adapter_pb2.LoadAdapterRequest,
    adapter_pb2.UnloadAdapterRequest,
    adapter_pb2.GetAdapterRequest,
    adapter_pb2.ListAdaptersRequest,
    adapter_pb2.LoadFusionRequest,
    adapter_pb2.UnloadFusionRequest,
    adapter_pb2.GetFusionRequest,
    adapter_pb2.ListFusionsRequest,
)
_STATUSES = [
    AdapterStatus(name=f"a{number}", state=AdapterState.READY, residency=Residency.HOST)
    for number in range(3)
]
_ADMISSION = Admission(
    Tokenizer(None),
    store=None,  # type: ignore[arg-type]  # what is checked before anything is leased
    fusions=None,  # type: ignore[arg-type]
    vocab_size=VOCAB,
    max_context_tokens=CONTEXT,
    default_max_new_tokens=16,
    pool_ranks=64,
)


def try_request(data: bytes) -> str:
    """Takes the input (a kind, then a request) as the server does; returns the reason why not, or "OK".

    Raises for whatever must not happen.
    """
    kind = REQUESTS[(data[0] if data else 0) % len(REQUESTS)]
    request_id = "minted"
    try:
        try:
            request = kind.FromString(data[1:])
        except (DecodeError, UnicodeDecodeError):
            return "MALFORMED_REQUEST"
        request_id = request_id_of(request)
        _take(request)
    except FusionServeError as error:
        _check_refusal(error, request_id)
        return error.reason
    return "OK"


def _take(request: Any) -> None:
    match request:
        case inference_pb2.GenerateRequest():
            _check_params(to_generate_params(request, 1.0))
        case inference_pb2.StreamGenerateRequest():
            _check_params(to_generate_params(request.request, 1.0))
        case inference_pb2.DetokenizeRequest():
            _ADMISSION.check_token_ids(tuple(request.token_ids), "token_ids")
        case adapter_pb2.ListAdaptersRequest() | adapter_pb2.ListFusionsRequest():
            page, token = to_page(request, _STATUSES)
            assert len(page) <= 3 and isinstance(token, str)
        case adapter_pb2.LoadAdapterRequest() | adapter_pb2.LoadFusionRequest():
            checks.check_new_name("name", request.name, MODEL)
            if request.HasField("path"):
                checks.check_path("path", request.path)
                assert ".." not in request.path.split("/") and not request.path.startswith("/")
        case _ if hasattr(request, "name"):
            checks.check_name("name", request.name)
            assert is_name(request.name)


def _check_params(params: GenerateParams) -> None:
    """Every documented range, once more and in other words, and then what needs the model's numbers."""
    sampling, stopping = params.sampling, params.stopping
    assert 1 <= params.num_candidates <= limits.MAX_CANDIDATES
    assert 0 <= sampling.temperature <= limits.MAX_TEMPERATURE and 0 < sampling.top_p <= 1
    assert 0 <= sampling.min_p <= 1
    assert limits.MIN_REPETITION_PENALTY <= sampling.repetition_penalty <= limits.MAX_REPETITION_PENALTY
    assert math.isfinite(sampling.presence_penalty) and math.isfinite(sampling.frequency_penalty)
    assert len(sampling.logit_bias) <= limits.MAX_LOGIT_BIAS_ENTRIES
    assert all(math.isfinite(bias) for bias in sampling.logit_bias.values())
    assert len(stopping.stop) <= limits.MAX_STOP_STRINGS and all(stopping.stop)
    assert stopping.max_new_tokens is None or stopping.max_new_tokens >= max(1, stopping.min_new_tokens)
    assert stopping.time_limit_s is None or stopping.time_limit_s > 0
    for term in params.adaptation.terms:
        assert is_name(term.name) and math.isfinite(term.scale)
    if isinstance(params.prompt, TokenPrompt):
        _ADMISSION._check_prompt(params.prompt.token_ids)
        assert all(token_id < VOCAB for token_id in params.prompt.token_ids)
        assert 1 <= _ADMISSION._max_new_tokens(params, len(params.prompt.token_ids)) < CONTEXT
    _ADMISSION._check_tokens(params)


def _check_refusal(error: FusionServeError, request_id: str) -> None:
    assert isinstance(error, InvalidRequestError), error
    assert re.fullmatch(r"[A-Z][A-Z0-9_]{1,62}", error.reason) and error.field
    assert "\n" not in error.message and error.message.isprintable(), error.message
    status = to_status(error, request_id)
    trailers = to_trailers(error, status, request_id)
    assert sum(len(key) + len(value) for key, value in trailers) + len(status.message) < MAX_TRAILER_BYTES
