"""Families whose layers are computed by the engine's own decoder, with adapters: against PEFT, and natively."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft_adapters import quiet_peft, randomize, save, wrap
from served_adapters import Outcome, blend, collect_all, lora, make_params, make_prompt, running_engine
from tiny_models import CONFIGS, FAMILIES, MIXTURES, make_tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fusionserve.generation import Adaptation, OutputOptions
from fusionserve.kernels.native_layer import NativeLayer, NativeLayers
from fusionserve.kernels.packed_linear import can_pack

needs_packing = pytest.mark.skipif(
    not can_pack(torch.zeros(16, 2, dtype=torch.bfloat16)), reason="the processor has no packed product"
)
NUM_TOKENS = 6
KINDS = (Adaptation(), lora("one"), blend(one=0.5, two=-0.75), Adaptation(), lora("two"))
WEIGHTS: tuple[dict[str, float], ...] = ({}, {"one": 1.0}, {"one": 0.5, "two": -0.75}, {}, {"two": 1.0})
# Of bfloat16 log-probabilities, on average; a token that is routed to another expert has another sum.
MAX_SHORTFALL, MAX_SHORTFALL_OF_MIXTURE = 0.25, 0.5


@pytest.fixture(params=sorted(FAMILIES | MIXTURES))
def family(request: pytest.FixtureRequest) -> str:
    """Each of them."""
    name: str = request.param
    return name


@pytest.fixture
def directory(family: str, tmp_path: Path) -> Path:
    """A base of the family, tied, and two adapters for all its linear modules."""
    config = CONFIGS[family]()
    config.tie_word_embeddings = True
    model = make_tiny_model(config)
    model.save_pretrained(tmp_path / "base")
    # PEFT would put rows beside experts, too.
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if family in MIXTURES else "all-linear"
    for seed, name in enumerate(("one", "two"), start=1):
        adapter = wrap(model, target_modules=targets, r=3 + seed, lora_alpha=2)
        randomize(adapter, seed=seed)
        save(adapter, tmp_path / "adapters" / name)
    return tmp_path


async def serve(directory: Path, **options: Any) -> list[Outcome]:
    """All KINDS in one batch, in chunks."""
    output = OutputOptions(logprobs=1, prompt_logprobs=1)
    requests = [
        make_params(str(n), kind, make_prompt(n, 9 + 5 * n), output=output, num_tokens=NUM_TOKENS)
        for n, kind in enumerate(KINDS)
    ]
    base, adapters = directory / "base", directory / "adapters"
    async with running_engine(base, adapters, max_batch_tokens=24, **options) as engine:
        return await collect_all(engine, requests)


def logprobs_of(outcome: Outcome) -> Tensor:
    """Of the prompt's tokens but the first, and of the continuation's."""
    reported = (*outcome.finished.prompt_logprobs, *outcome.finished.candidates[0].logprobs)
    return torch.tensor([entry.chosen.logprob for entry in reported])


def peft_logprobs(directory: Path, weights: dict[str, float], token_ids: list[int]) -> Tensor:
    """What PEFT gives each token but the first, with adapters' scales multiplied by the weights."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(directory / "base", attn_implementation="eager")
    with quiet_peft():
        for name, weight in weights.items():
            path, first = str(directory / "adapters" / name), not isinstance(model, PeftModel)
            if first:
                model = PeftModel.from_pretrained(model, path, adapter_name=name)
            else:
                model.load_adapter(path, adapter_name=name)
            for module in model.modules():
                if isinstance(module, LoraLayer) and name in module.scaling:
                    module.scaling[name] *= weight
        if isinstance(model, PeftModel):
            model.base_model.set_adapter(list(weights))
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    chosen = torch.tensor(token_ids[1:])
    return torch.log_softmax(logits[:-1], dim=-1).gather(1, chosen[:, None])[:, 0]


def differences(directory: Path, outcomes: list[Outcome]) -> list[Tensor]:
    """Of each request's log-probabilities from PEFT's."""
    found = []
    for n, (outcome, weights) in enumerate(zip(outcomes, WEIGHTS, strict=True)):
        token_ids = [*make_prompt(n, 9 + 5 * n), *outcome.tokens]
        found.append((logprobs_of(outcome) - peft_logprobs(directory, weights, token_ids)).abs())
    return found


async def test_crowd_in_float32_equals_peft(directory: Path) -> None:
    outcomes = await serve(directory)
    assert len({outcome.tokens for outcome in outcomes}) == len(outcomes)
    for difference in differences(directory, outcomes):
        assert difference.max() < 2e-4


@needs_packing
@pytest.mark.usefixtures("helpers")
async def test_crowd_in_one_native_call_gets_the_bits_of_kernels_one_by_one_and_is_near_peft(
    family: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[NativeLayers] = []
    compute_ = NativeLayers.compute_

    def spy(layers: NativeLayers, *args: Any) -> None:
        passes.append(layers)
        compute_(layers, *args)

    monkeypatch.setattr(NativeLayers, "compute_", spy)
    outcomes = await serve(directory, dtype="bfloat16")
    assert len(passes) > NUM_TOKENS
    for difference in differences(directory, outcomes):
        assert difference.mean() < (MAX_SHORTFALL_OF_MIXTURE if family in MIXTURES else MAX_SHORTFALL)
    monkeypatch.setattr(NativeLayer, "can_compute", lambda *_: False)
    again = await serve(directory, dtype="bfloat16")
    for ours, theirs in zip(outcomes, again, strict=True):
        assert torch.equal(logprobs_of(ours), logprobs_of(theirs)) and ours.tokens == theirs.tokens
