"""A token whose numbers are not finite ends the requests that have it, and is in no other request's context."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from served_adapters import collect, make_model, make_params, make_prompt, running_engine

from fusionserve.engine.async_engine import AsyncEngine
from fusionserve.errors import ArtifactError
from fusionserve.generation import GenerateParams

pytestmark = pytest.mark.gpu

BAD_TOKEN = 40
CHUNK = 28  # tokens: the second begins inside the second of the prefix's two blocks
PREFIX = tuple(token % BAD_TOKEN for token in make_prompt(3, 32))
BAD_PROMPT = (*PREFIX, *PREFIX[:8], BAD_TOKEN, *PREFIX)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of which one token's embedding is not finite."""
    broken = make_model("llama")
    with torch.no_grad():
        broken.get_input_embeddings().weight[BAD_TOKEN] = float("nan")
    directory = tmp_path_factory.mktemp("base") / "broken"
    broken.save_pretrained(directory)
    return directory


async def reason_of(engine: AsyncEngine, params: GenerateParams) -> str:
    """Why the request ends."""
    with pytest.raises(ArtifactError) as caught:
        await collect(engine, params)
    return caught.value.reason


@pytest.mark.parametrize("length", [44, len(BAD_PROMPT)], ids=["in the last chunk", "in an earlier chunk"])
async def test_prefix_of_a_prompt_that_was_not_finite_is_served_as_alone(model: Path, length: int) -> None:
    asked = make_params("asked", prompt=(*PREFIX, 5, 9, 17))
    async with running_engine(model, None, enable_prefix_cache=False) as engine:
        alone = await collect(engine, asked)
    async with running_engine(model, None, max_batch_tokens=CHUNK, max_batch_requests=4) as engine:
        for _ in range(2):
            bad = make_params("bad", prompt=BAD_PROMPT[:length])
            assert await reason_of(engine, bad) == "OUTPUT_NOT_FINITE"
            assert (await collect(engine, asked)).tokens == alone.tokens
