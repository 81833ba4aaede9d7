"""llama.cpp through the low-level functions of `llama-cpp-python`: all streams of a batch in one context.

A context has one set of adapters at a time, so a mixed round runs adapter by adapter, each with its own streams. These
are sequences 0, 1, ... of the context, whatever their numbers: a batch is cut where sequences do not follow one
another.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import llama_cpp
import numpy as np

from fusionserve.loadtest.bench.protocol import MIXED, Job, Outcome, Setup, answer_jobs

_PROMPT_BATCH_TOKENS = 2048
_ADAPTER = ctypes.POINTER(ctypes.c_void_p)


class LlamaCpp:
    """A GGUF model, its adapters and one context with room for all streams. Options: `gguf`, `gguf_adapters`."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.versions = {"llama-cpp-python": version("llama-cpp-python")}
        llama_cpp.llama_backend_init()
        path = setup.options["gguf"].encode()
        self._model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
        if not self._model:
            raise ValueError("llama.cpp does not load the model")
        self._context = llama_cpp.llama_init_from_model(self._model, _context_params(setup))
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._adapters = [self._load_adapter(path) for path in setup.options["gguf_adapters"].split()]
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(_PROMPT_BATCH_TOKENS, 0, 1)

    def run(self, job: Job) -> Outcome:
        """All streams together, or, of a mixed round, the streams of one adapter after those of another."""
        started_s = time.monotonic()
        token_ids: list[list[int]] = [[] for _ in job.prompts]
        groups = self._groups(job)
        for adapter, streams in groups:
            self._use_adapter(adapter)
            llama_cpp.llama_memory_clear(self._memory, False)
            self._feed_prompts(job, streams, token_ids)
            prompt_s = time.monotonic() - started_s
            for _ in range(job.new_tokens - 1):
                self._feed_last_tokens(job, streams, token_ids)
        return Outcome(prompt_s if len(groups) == 1 else None, time.monotonic() - started_s, token_ids)

    def close(self) -> None:
        """Frees the context and the model."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def _load_adapter(self, path: str) -> Any:
        adapter = llama_cpp.llama_adapter_lora_init(self._model, path.encode())
        if not adapter:
            raise ValueError("llama.cpp does not load the adapter")
        return adapter

    def _groups(self, job: Job) -> list[tuple[int | None, list[int]]]:
        """(adapter, its streams): what may share a batch."""
        streams = range(len(job.prompts))
        if job.kind != MIXED:
            return [(None, list(streams))]
        of_streams = [self._setup.adapter_of(stream) for stream in streams]
        return [(each, [s for s in streams if of_streams[s] == each]) for each in sorted(set(of_streams))]

    def _use_adapter(self, adapter: int | None) -> None:
        chosen = [] if adapter is None else [self._adapters[adapter]]
        pointers = (_ADAPTER * len(chosen))(*chosen)
        scales = (ctypes.c_float * len(chosen))(*(1.0 for _ in chosen))
        if llama_cpp.llama_set_adapters_lora(self._context, pointers, len(chosen), scales):
            raise ValueError("llama.cpp does not take the adapter")

    def _feed_prompts(self, job: Job, streams: Sequence[int], token_ids: list[list[int]]) -> None:
        """Whole prompts, as many at a time as a batch holds; appends each stream's first token."""
        per_batch = max(1, _PROMPT_BATCH_TOKENS // max(len(job.prompts[stream]) for stream in streams))
        for start in range(0, len(streams), per_batch):
            together = streams[start : start + per_batch]
            for sequence, stream in enumerate(together, start):
                last = len(job.prompts[stream]) - 1
                for position, token_id in enumerate(job.prompts[stream]):
                    self._add(token_id, position, sequence, wants_logits=position == last)
            self._decode(together, token_ids)

    def _feed_last_tokens(self, job: Job, streams: Sequence[int], token_ids: list[list[int]]) -> None:
        for sequence, stream in enumerate(streams):
            generated = token_ids[stream]
            position = len(job.prompts[stream]) + len(generated) - 1
            self._add(generated[-1], position, sequence, wants_logits=True)
        self._decode(streams, token_ids)

    def _add(self, token_id: int, position: int, sequence: int, *, wants_logits: bool) -> None:
        batch, index = self._batch, self._batch.n_tokens
        batch.token[index] = token_id
        batch.pos[index] = position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = sequence
        batch.logits[index] = wants_logits
        batch.n_tokens = index + 1

    def _decode(self, streams: Sequence[int], token_ids: list[list[int]]) -> None:
        """Runs the batch, empties it and appends the greedy token of each stream, whose logits are in their order."""
        if llama_cpp.llama_decode(self._context, self._batch):
            raise ValueError("llama.cpp failed to decode a batch")
        self._batch.n_tokens = 0
        logits = llama_cpp.llama_get_logits(self._context)
        rows = np.ctypeslib.as_array(logits, shape=(len(streams), self._vocab_size))
        for stream, token_id in zip(streams, rows.argmax(axis=1).tolist(), strict=True):
            token_ids[stream].append(token_id)


def _context_params(setup: Setup) -> llama_cpp.llama_context_params:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = setup.num_streams * (setup.tokens_per_stream + 256)
    params.n_batch = _PROMPT_BATCH_TOKENS
    params.n_seq_max = setup.num_streams
    params.n_threads = params.n_threads_batch = setup.num_threads
    params.no_perf = True
    return params


if __name__ == "__main__":
    answer_jobs(LlamaCpp)
