"""One line of log per generation, if asked for; what was said is in it only if that is asked for, too."""

from __future__ import annotations

import logging
import time

from fusionserve.generation import GenerationFinished
from fusionserve.server.access import caller
from fusionserve.server.generate_params import kind_of
from fusionserve.server.request_ids import current_request_id
from fusionserve.v1 import inference_pb2

logger = logging.getLogger(__name__)

OFF, META, TEXT = "off", "meta", "text"
_MAX_UNANSWERED = 1000  # characters of a prompt: a refused one costs its client nothing, however long it is


class RequestLog:
    """Makes entries as `detail` says: "off", "meta" (ids, sizes, codes) or "text" (prompt and output, too)."""

    def __init__(self, detail: str) -> None:
        self._detail = detail

    def entry(self, request: inference_pb2.GenerateRequest) -> RequestLogEntry:
        """The entry of a request that has just come."""
        return RequestLogEntry(request, self._detail)


class RequestLogEntry:
    """Gathers what is to be told of one request; `finished` is set if it ends with a result."""

    def __init__(self, request: inference_pb2.GenerateRequest, detail: str) -> None:
        self.finished: GenerationFinished | None = None
        self._request = request
        self._detail = detail
        self._id = current_request_id()
        self._caller = caller().name
        self._started_s = time.monotonic()

    def write(self, status: str, finish_reason: str) -> None:
        """Logs it. Client's texts are quoted, so that none can look like a line of its own."""
        if self._detail == OFF:
            return
        words = [
            f"request={self._id!r}",
            f"caller={self._caller or '-'}",
            f"kind={kind_of(self._request)}",
            f"status={status}",
            f"finish={finish_reason}",
            f"seconds={time.monotonic() - self._started_s:.3f}",
        ]
        if self.finished is not None:
            usage = self.finished.usage
            words += [f"prompt_tokens={usage.prompt_tokens}", f"generated_tokens={usage.generated_tokens}"]
        if self._detail == TEXT:
            words += self._said()
        logger.info(" ".join(words))

    def _said(self) -> list[str]:
        prompt = repr(self._prompt())
        if self.finished is None:
            return [f"prompt={prompt[:_MAX_UNANSWERED]}"]
        return [f"prompt={prompt}", *(f"output={candidate.text!r}" for candidate in self.finished.candidates)]

    def _prompt(self) -> object:
        match self._request.WhichOneof("prompt"):
            case "text":
                return self._request.text
            case "token_ids":
                return list(self._request.token_ids.ids)
            case "chat":
                return [(message.role, message.content) for message in self._request.chat.messages]
        return ""
