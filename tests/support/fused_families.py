"""A fusion on the tiny model of a family, served, beside the unfolded attention."""

from __future__ import annotations

from pathlib import Path

import torch
from peft_adapters import randomize, save, wrap
from served_adapters import collect_all, make_params, make_prompt, running_engine
from served_fusions import run_unfolded, write_fusion
from tiny_models import CONFIGS, make_tiny_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fusionserve.fusion.config import Scope
from fusionserve.generation import Adaptation, OutputOptions

MEMBERS = ("one", "two")
NUM_TOKENS = 5
HEADS = ("q_proj", "k_proj", "v_proj", "query_key_value", "qkv_proj", "c_attn")


def write_fused(family: str, attention_at: str, folder: Path) -> None:
    """A base of the family, two adapters and a fusion of scope layer.

    The weights of a layer come from its first module, or with `attention_at` "output" from what its attention makes,
    and reach its MLP.
    """
    model = make_tiny_model(CONFIGS[family]())
    model.save_pretrained(folder / "base")
    targets = [path for path in linear_paths(model) if attention_at == "first" or not path.endswith(HEADS)]
    for seed, name in enumerate(MEMBERS, start=1):
        adapter = wrap(model, target_modules=targets, r=3 + seed, lora_alpha=4)
        randomize(adapter, seed=seed)
        save(adapter, folder / "adapters" / name)
    write_fusion(
        folder / "fusions", "mix", MEMBERS, folder / "adapters", seed=1, model=model, scope=Scope.LAYER
    )


async def assert_weighed_as_unfolded(family: str, device: str, folder: Path) -> None:
    """Serves what `write_fused` has written and compares every token's log-probability."""
    output = OutputOptions(logprobs=0, prompt_logprobs=0)
    requests = [
        make_params(str(n), Adaptation("fusion", fusion="mix"), prompt, output=output, num_tokens=NUM_TOKENS)
        for n, prompt in enumerate(make_prompt(n, 7 + 6 * n) for n in range(2))
    ]
    options = {"fusion_dirs": (folder / "fusions",), "max_batch_tokens": 16, "device": device}
    async with running_engine(folder / "base", folder / "adapters", **options) as engine:
        outcomes = await collect_all(engine, requests)
        await engine.unload_fusion("mix", force=False)
    for n, outcome in enumerate(outcomes):
        token_ids = (*make_prompt(n, 7 + 6 * n), *outcome.tokens)
        model = make_tiny_model(CONFIGS[family]())
        unfolded = run_unfolded(model, folder / "adapters", folder / "fusions" / "mix", token_ids)
        reported = (*outcome.finished.prompt_logprobs, *outcome.finished.candidates[0].logprobs)
        found = torch.tensor([entry.chosen.logprob for entry in reported])
        chosen = unfolded.logprobs[:-1].gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(found, chosen, rtol=0, atol=3e-3)


def linear_paths(model: PreTrainedModel) -> list[str]:
    """Of the linear modules of the layers."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linear = (nn.Linear, Conv1D)
    return [p for p, module in model.named_modules() if isinstance(module, linear) and module is not head]
