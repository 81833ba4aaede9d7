"""Model families and types beside transformers: generated tokens/s of one shape, in process, on the same prompts.

    python -P tools/family_speed.py [--families llama gemma3 ...] [--dtypes bfloat16 float32 float16]
                                    [--quantize none int8 int4] [--repeats 3]

Random weights of W1's sizes (docs/benchmarks.md): 576 wide, 30 layers, 16 streams of 128 tokens in and 32 out, greedy.
Both take turns; medians over the repeats, as Markdown.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: as the server sets it

import argparse
import asyncio
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from fusionserve.config import EngineConfig
from fusionserve.engine.async_engine import AsyncEngine
from fusionserve.garbage import spare_from_collection
from fusionserve.generation import GenerateParams, SamplingParams, StoppingCriteria, TokenPrompt
from fusionserve.metrics import AdapterLabels

_NUM_STREAMS, _PROMPT_TOKENS, _NEW_TOKENS = 16, 128, 32
_WIDE = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "vocab_size": 49152}
_COMMON = {**_WIDE, "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_GROUPED = {**_COMMON, "num_key_value_heads": 3, "intermediate_size": 1536, "tie_word_embeddings": True}
_GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64}
_EXPERTS = {"num_hidden_layers": 8, "num_experts_per_tok": 2}

# By transformers' name of the architecture; what is not said is its default.
_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": None, "head_dim": 64},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 64},
    "smollm3": _GROUPED,
    "granite": _GROUPED,
    "phi3": _GROUPED,
    "gemma": {**_GROUPED, "head_dim": 64},
    "gemma2": {**_GROUPED, **_GEMMA},
    "gemma3_text": {**_GROUPED, **_GEMMA},
    "olmo2": _GROUPED,
    "olmo3": _GROUPED,
    "arcee": {**_COMMON, "num_key_value_heads": 3, "intermediate_size": 2304, "tie_word_embeddings": True},
    "stablelm": _GROUPED,
    "starcoder2": {**_COMMON, "num_key_value_heads": 3, "intermediate_size": 2304, "sliding_window": None},
    "nemotron": {**_COMMON, "num_key_value_heads": 3, "intermediate_size": 2304, "head_dim": 64},
    "glm": {**_GROUPED, "head_dim": 64},
    "glm4": {**_GROUPED, "head_dim": 64},
    "ernie4_5": _GROUPED,
    "helium": {**_GROUPED, "head_dim": 64},
    "cohere": _GROUPED,
    "cohere2": {**_GROUPED, "sliding_window": 4096},
    "phi": {**_COMMON, "intermediate_size": 2304},
    "gpt2": {"n_embd": 576, "n_layer": 30, "n_head": 9, "n_positions": 2048, "vocab_size": 49152},
    "gpt_neox": {**_COMMON, "intermediate_size": 2304},
    "opt": {**_COMMON, "ffn_dim": 2304, "word_embed_proj_dim": 576},
    "mixtral": {**_GROUPED, **_EXPERTS, "num_local_experts": 8},
    "granitemoe": {**_GROUPED, **_EXPERTS, "num_local_experts": 8},
    "qwen3_moe": {**_GROUPED, **_EXPERTS, "num_experts": 8, "moe_intermediate_size": 768, "head_dim": 64},
}


def main() -> None:
    """Prints a line for each family and type."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=list(_FAMILIES), default=list(_FAMILIES))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--quantize", nargs="+", default=["none"])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    print("| family | type | quantized | fusionserve, tokens/s | transformers | ratio |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    for family in arguments.families:
        with tempfile.TemporaryDirectory() as folder:
            _save(family, Path(folder))
            for dtype, quantize in itertools.product(arguments.dtypes, arguments.quantize):
                ours, theirs = asyncio.run(_race(Path(folder), dtype, quantize, arguments.repeats))
                print(f"| {family} | {dtype} | {quantize} |", end=" ")
                print(f"{ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} |", flush=True)


def _save(family: str, folder: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **_FAMILIES[family])
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)  # type: ignore[no-untyped-call]


async def _race(folder: Path, dtype: str, quantize: str, repeats: int) -> tuple[float, float]:
    """Tokens/s of both, ours quantized; the first round warms them up."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    config = EngineConfig(model=str(folder), model_name="m", dtype=dtype, quantize=quantize)
    engine = AsyncEngine.load(config, AdapterLabels(1))
    await engine.start()
    spare_from_collection()
    times: list[tuple[float, float]] = []
    try:
        for repeat in range(repeats + 1):
            numbers = random.Random(repeat)
            prompts = [numbers.choices(range(1000, 40000), k=_PROMPT_TOKENS) for _ in range(_NUM_STREAMS)]
            start_s = time.perf_counter()
            await asyncio.gather(*(_stream(engine, f"{repeat}-{n}", p) for n, p in enumerate(prompts)))
            between_s = time.perf_counter()
            _generate(model, prompts)
            times.append((between_s - start_s, time.perf_counter() - between_s))
    finally:
        await engine.close()
    ours_s, theirs_s = (statistics.median(times) for times in zip(*times[1:], strict=True))
    return _NUM_STREAMS * _NEW_TOKENS / ours_s, _NUM_STREAMS * _NEW_TOKENS / theirs_s


async def _stream(engine: AsyncEngine, request_id: str, prompt: list[int]) -> None:
    params = GenerateParams(
        request_id=request_id,
        prompt=TokenPrompt(tuple(prompt)),
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingCriteria(max_new_tokens=_NEW_TOKENS, ignore_eos=True),
    )
    async with aclosing(engine.generate(params)) as events:
        async for _ in events:
            pass


def _generate(model: PreTrainedModel, prompts: list[list[int]]) -> None:
    token_ids = torch.tensor(prompts)
    lengths = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS}
    mask = torch.ones_like(token_ids)
    with torch.inference_mode():
        model.generate(token_ids, attention_mask=mask, do_sample=False, pad_token_id=2, **lengths)  # type: ignore[operator]


if __name__ == "__main__":
    main()
