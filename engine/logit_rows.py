"""Which logits a step computes, and what its chunks are given from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fusionserve.engine.chunk_result import ChunkResult
from fusionserve.engine.fused_chunks import LateWeights
from fusionserve.engine.fused_weights import ChunkWeights
from fusionserve.engine.sampler import Logprobs, SamplerRow, logprobs_of, sample
from fusionserve.engine.scheduled_batch import ScheduledChunk
from fusionserve.kernels.index_tensor import index_tensor


@dataclass(frozen=True, slots=True)
class LogitRows:
    """Rows [start, end) of the logits are those of a chunk's tokens at `places` in the batch; there may be none."""

    chunk: ScheduledChunk
    start: int
    places: range
    is_last: bool  # whether the next token is drawn from the last row
    reports_prompt: bool

    @property
    def end(self) -> int:
        """The row after the last one."""
        return self.start + len(self.places)


def plan_logit_rows(chunks: Sequence[ScheduledChunk], starts: Sequence[int]) -> list[LogitRows]:
    """The rows of each of `chunks`, which begin at `starts` in the batch."""
    planned, num_rows = [], 0
    for chunk, start in zip(chunks, starts, strict=False):
        rows = _to_rows(chunk, start, num_rows)
        planned.append(rows)
        num_rows = rows.end
    return planned


def to_results(
    planned: Sequence[LogitRows],
    logits: Tensor,
    eos_token_ids: frozenset[int],
    late_weights: LateWeights,
) -> list[ChunkResult]:
    """What each chunk is given, from the logits [rows, vocab] of all of them, with the fusion weights of fused ones.

    A GPU is waited for once all is asked of it.
    """
    drawn = iter(_sample([rows for rows in planned if rows.is_last], logits, eos_token_ids))
    tokens = [next(drawn) if rows.is_last else None for rows in planned]
    told = _chosen_logprobs(planned, tokens, logits)
    weights = late_weights.read()
    logprobs = [told.get(rows.chunk) for rows in planned] if told else [None] * len(planned)
    fused = [weights.get(rows.chunk) for rows in planned] if weights else [None] * len(planned)
    return [_to_result(*each, logits) for each in zip(planned, tokens, logprobs, fused, strict=True)]


def sampler_row(chunk: ScheduledChunk, eos_token_ids: frozenset[int]) -> SamplerRow:
    """What shapes the draw of the token after the chunk."""
    request, generation = chunk.request, chunk.request.generation
    sampling, stopping = generation.params.sampling, generation.params.stopping
    banned: tuple[int, ...] = ()
    if chunk.num_generated < stopping.min_new_tokens:
        banned = (*stopping.stop_token_ids, *(() if stopping.ignore_eos else eos_token_ids))
    return SamplerRow(
        sampling,
        generation.prompt_token_ids,
        request.generated_ids if sampling.changes_logits else (),
        banned,
        () if sampling.is_greedy else request.uniforms(chunk.num_generated),
    )


def _to_rows(chunk: ScheduledChunk, start: int, first_row: int) -> LogitRows:
    """The logits needed: of all tokens of a prompt to be reported, else of the last one, once it is there."""
    end, is_last = start + chunk.num_tokens, chunk.is_last
    reports_prompt = chunk.request.wants_prompt_logprobs and chunk.start < chunk.request.prompt_length
    num_rows = chunk.num_tokens if reports_prompt else int(is_last)
    return LogitRows(chunk, first_row, range(end - num_rows, end), is_last, reports_prompt)


def _sample(last: Sequence[LogitRows], logits: Tensor, eos_token_ids: frozenset[int]) -> Sequence[int | None]:
    """The tokens after the chunks of `last`."""
    if not last:
        return ()
    wanted = [rows.end - 1 for rows in last]
    is_all = len(wanted) == len(logits)  # they ascend
    rows = [sampler_row(rows.chunk, eos_token_ids) for rows in last]
    return sample(logits if is_all else logits.index_select(0, index_tensor(wanted, logits.device)), rows)


def _chosen_logprobs(
    planned: Sequence[LogitRows], tokens: Sequence[int | None], logits: Tensor
) -> dict[ScheduledChunk, Logprobs]:
    """Of the tokens that were drawn, for the chunks whose requests ask for them."""
    asked = {
        rows.chunk: (rows.end - 1, token)
        for rows, token in zip(planned, tokens, strict=True)
        if token is not None and _num_top(rows.chunk) is not None
    }
    if not asked:
        return {}
    places, token_ids = zip(*asked.values(), strict=True)
    found = logprobs_of(logits, places, token_ids, max(_num_top(chunk) or 0 for chunk in asked))
    return {chunk: each.first(_num_top(chunk) or 0) for chunk, each in zip(asked, found, strict=True)}


def _num_top(chunk: ScheduledChunk) -> int | None:
    return chunk.request.generation.params.output.logprobs


def _to_result(
    rows: LogitRows,
    token: int | None,
    logprobs: Logprobs | None,
    weights: ChunkWeights | None,
    logits: Tensor,
) -> ChunkResult:
    chunk = rows.chunk
    return ChunkResult(
        chunk,
        token,
        is_finite=token is not None or not rows.is_last,
        logprobs=logprobs,
        prompt_logprobs=_prompt_logprobs(rows, logits) if rows.reports_prompt else (),
        fusion_weights=weights,
    )


def _prompt_logprobs(rows: LogitRows, logits: Tensor) -> tuple[Logprobs, ...]:
    """Log-probabilities of the prompt tokens that follow the chunk's positions; the last position may have none."""
    chunk, generation = rows.chunk, rows.chunk.request.generation
    num_top = generation.params.output.prompt_logprobs
    assert num_top is not None
    following = generation.prompt_token_ids[chunk.start + 1 : chunk.end + 1]
    own = range(rows.start, rows.start + len(following))
    return tuple(logprobs_of(logits, own, following, num_top)) if following else ()
