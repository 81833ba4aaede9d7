"""Does a request get the same tokens in a crowd as alone? Asked of a server with the embedded model, through gRPC.

    python -P -m fusionserve.loadtest.company --dtype bfloat16 --quantize nf4

Random prompts for the base, every adapter, a blend and the fusion; each request first alone, then all of them at once.
Prints how many of them differed. In float32 none may; the command then fails.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Sequence

from fusionserve.client import AsyncClient, GenerateOptions
from fusionserve.loadtest.serving import serving

_ADAPTERS = ("changelog", "cpp", "perl", "polish", "spanish")
_SINGLE: tuple[GenerateOptions, ...] = tuple(GenerateOptions(adapter=name) for name in _ADAPTERS)
_ADAPTATIONS: tuple[GenerateOptions, ...] = (
    {},
    *_SINGLE,
    {"blend": {"perl": 0.5, "spanish": 0.5}},
    {"fusion": "domains"},
)
_PROMPT_TOKEN_IDS = range(1, 4096)
_MAX_PROMPT_TOKENS = 40


def main() -> None:
    """Ask, print, and fail where the promise is broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--quantize", choices=("none", "int8", "int4", "nf4"), default="none")
    parser.add_argument("--prompts", type=int, default=8, help="for each adaptation")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy; else each has a seed")
    parser.add_argument("--top-p", type=float, default=1.0)
    arguments = parser.parse_args()
    with serving({"--dtype": arguments.dtype, "--quantize": arguments.quantize}) as (target, _):
        different, asked = asyncio.run(_compare(target, arguments.prompts, _options(arguments)))
    print(
        f"{arguments.dtype}, quantize {arguments.quantize}: {different} of {asked} requests differed in a crowd"
    )
    if different and arguments.dtype == "float32":
        sys.exit("in float32 none may differ")


def _options(arguments: argparse.Namespace) -> GenerateOptions:
    """What all requests have in common."""
    return GenerateOptions(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_new_tokens=arguments.new_tokens,
        ignore_eos=True,
    )


async def _compare(target: str, num_prompts: int, options: GenerateOptions) -> tuple[int, int]:
    """(requests whose tokens differed, requests)."""
    numbers = random.Random(0)
    requests = [
        (
            numbers.choices(_PROMPT_TOKEN_IDS, k=numbers.randint(1, _MAX_PROMPT_TOKENS)),
            GenerateOptions(**{**options, **adaptation, "seed": seed}),
        )
        for seed in range(num_prompts)
        for adaptation in _ADAPTATIONS
    ]
    async with AsyncClient(target) as client:
        alone = [await _generate(client, *request, "alone") for request in requests]
        crowd = await asyncio.gather(*(_generate(client, *request, "crowd") for request in requests))
    return sum(one != other for one, other in zip(alone, crowd, strict=True)), len(requests)


async def _generate(
    client: AsyncClient, prompt: Sequence[int], options: GenerateOptions, salt: str
) -> tuple[int, ...]:
    """The tokens; the salt keeps what was computed alone out of the crowd's prefix cache."""
    salted: GenerateOptions = {**options, "cache_salt": salt}
    return (await client.generate(prompt, **salted)).token_ids


if __name__ == "__main__":
    main()
