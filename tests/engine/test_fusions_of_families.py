"""Fusions on bases of other families: tokens are weighed as by the unfolded attention, wherever it is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from device_kernels import DEVICE, serve_in_triton
from peft_adapters import randomize, save, wrap
from served_adapters import collect_all, make_params, make_prompt, running_engine
from served_fusions import unfolded_logprobs, write_fusion
from tiny_models import CONFIGS, make_tiny_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fusionserve.fusion.config import Scope
from fusionserve.generation import Adaptation, OutputOptions
from fusionserve.kernels.native_layer import NativeLayer

MEMBERS = ("one", "two")
NUM_TOKENS = 5
# Attention and MLP side by side; one after the other; queries, keys and values or gate and up in one module.
PARALLEL = ("gpt_neox", "phi", "cohere", "cohere2", "stablelm_parallel")
HEADS = ("q_proj", "k_proj", "v_proj", "query_key_value", "qkv_proj", "c_attn")
FAMILIES = (*PARALLEL, "gpt_neox_serial", "gpt2", "phi3", "gemma2", "olmo2")

Way = Callable[[pytest.MonkeyPatch], str]


def in_one_call(monkeypatch: pytest.MonkeyPatch) -> str:
    """All layers natively, where that is possible."""
    return "cpu"


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> str:
    """Kernel by kernel."""
    monkeypatch.setattr(NativeLayer, "can_compute", lambda *_: False)
    return "cpu"


def in_triton(monkeypatch: pytest.MonkeyPatch) -> str:
    """As on a GPU."""
    serve_in_triton(monkeypatch)
    return DEVICE.type


def linear_paths(model: PreTrainedModel) -> list[str]:
    """Of the linear modules of the layers."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linear = (nn.Linear, Conv1D)
    return [p for p, module in model.named_modules() if isinstance(module, linear) and module is not head]


CASES = [
    *(
        (family, at, way)
        for family in FAMILIES
        for at in ("first", "output")
        for way in (in_one_call, one_by_one)
    ),
    *(("gpt_neox", "first", in_triton), ("phi", "output", in_triton)),  # which takes long
]


# Of the interpreter: 1 / (1 + inf) is meant.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize(
    ("family", "attention_at", "way"), CASES, ids=lambda value: getattr(value, "__name__", value)
)
async def test_fusion_of_a_layer_equals_the_unfolded_model(
    family: str, attention_at: str, way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer's weights come from its first module, or from what its attention makes, and reach its MLP."""
    model = make_tiny_model(CONFIGS[family]())
    model.save_pretrained(tmp_path / "base")
    targets = [path for path in linear_paths(model) if attention_at == "first" or not path.endswith(HEADS)]
    for seed, name in enumerate(MEMBERS, start=1):
        adapter = wrap(model, target_modules=targets, r=3 + seed, lora_alpha=4)
        randomize(adapter, seed=seed)
        save(adapter, tmp_path / "adapters" / name)
    base, adapters = make_tiny_model(CONFIGS[family]()), tmp_path / "adapters"
    write_fusion(tmp_path / "fusions", "mix", MEMBERS, adapters, seed=1, model=base, scope=Scope.LAYER)
    output = OutputOptions(logprobs=0, prompt_logprobs=0)
    requests = [
        make_params(str(n), Adaptation("fusion", fusion="mix"), prompt, output=output, num_tokens=NUM_TOKENS)
        for n, prompt in enumerate(make_prompt(n, 7 + 6 * n) for n in range(2))
    ]
    options = {"fusion_dirs": (tmp_path / "fusions",), "max_batch_tokens": 16, "device": way(monkeypatch)}
    async with running_engine(tmp_path / "base", adapters, **options) as engine:
        outcomes = await collect_all(engine, requests)
        await engine.unload_fusion("mix", force=False)
    for n, outcome in enumerate(outcomes):
        token_ids = (*make_prompt(n, 7 + 6 * n), *outcome.tokens)
        model = make_tiny_model(CONFIGS[family]())
        expected = unfolded_logprobs(model, adapters, tmp_path / "fusions" / "mix", token_ids)[:-1]
        reported = (*outcome.finished.prompt_logprobs, *outcome.finished.candidates[0].logprobs)
        found = torch.tensor([entry.chosen.logprob for entry in reported])
        chosen = expected.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(found, chosen, rtol=0, atol=3e-3)
