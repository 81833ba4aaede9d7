"""The request that runs before the first client's, so that no client pays for first-time work."""

from __future__ import annotations

from fusionserve.generation import GenerateParams, SamplingParams, StoppingCriteria, TokenPrompt

WARM_UP = GenerateParams(
    request_id="warm-up",
    prompt=TokenPrompt((0, 1, 2)),
    sampling=SamplingParams(temperature=0.0),
    stopping=StoppingCriteria(max_new_tokens=2, ignore_eos=True),
)
