"""Families whose layers are computed by the engine's own decoder, with adapters: against PEFT, and natively."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft_adapters import quiet_peft, randomize, save, wrap
from served_adapters import Outcome, blend, collect_all, lora, make_params, make_prompt, running_engine
from tiny_models import CONFIGS, FAMILIES, MIXTURES, make_tiny_model
from torch import Tensor
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


@pytest.fixture(scope="module", params=sorted(FAMILIES | MIXTURES))
def family(request: pytest.FixtureRequest) -> str:
    """Each of them."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def directory(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of the family, tied, and two adapters for all its linear modules."""
    folder = tmp_path_factory.mktemp(family)
    config = CONFIGS[family]()
    config.tie_word_embeddings = True
    model = make_tiny_model(config)
    model.save_pretrained(folder / "base")
    # PEFT would put rows beside experts, too.
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if family in MIXTURES else "all-linear"
    for seed, name in enumerate(("one", "two"), start=1):
        adapter = wrap(model, target_modules=targets, r=3 + seed, lora_alpha=2)
        randomize(adapter, seed=seed)
        save(adapter, folder / "adapters" / name)
    return folder


@pytest.fixture(scope="module")
def peft(directory: Path) -> PeftModel:
    """The oracle: base and adapters as PEFT loads them."""
    base = AutoModelForCausalLM.from_pretrained(directory / "base", attn_implementation="eager")
    with quiet_peft():
        model = PeftModel.from_pretrained(base, str(directory / "adapters" / "one"), adapter_name="one")
        model.load_adapter(str(directory / "adapters" / "two"), adapter_name="two")
    return model.eval()


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


@contextmanager
def weighed(peft: PeftModel, weights: dict[str, float]) -> Iterator[None]:
    """In its block the adapters of `weights` are active, with their scales multiplied by the weights."""
    layers = [module for module in peft.modules() if isinstance(module, LoraLayer)]
    scalings = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update({name: layer.scaling[name] * weight for name, weight in weights.items()})
    with quiet_peft(), nullcontext() if weights else peft.disable_adapter():
        if weights:
            peft.base_model.set_adapter(list(weights))
        yield
    for layer, scaling in zip(layers, scalings, strict=True):
        layer.scaling.update(scaling)


def peft_logprobs(peft: PeftModel, weights: dict[str, float], token_ids: list[int]) -> Tensor:
    """What PEFT gives each token but the first."""
    with weighed(peft, weights), torch.no_grad():
        logits = peft(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    chosen = torch.tensor(token_ids[1:])
    return torch.log_softmax(logits[:-1], dim=-1).gather(1, chosen[:, None])[:, 0]


def differences(peft: PeftModel, outcomes: list[Outcome]) -> list[Tensor]:
    """Of each request's log-probabilities from PEFT's."""
    found = []
    for n, (outcome, weights) in enumerate(zip(outcomes, WEIGHTS, strict=True)):
        token_ids = [*make_prompt(n, 9 + 5 * n), *outcome.tokens]
        found.append((logprobs_of(outcome) - peft_logprobs(peft, weights, token_ids)).abs())
    return found


async def test_crowd_in_float32_equals_peft(directory: Path, peft: PeftModel) -> None:
    outcomes = await serve(directory)
    assert len({outcome.tokens for outcome in outcomes}) == len(outcomes)
    for difference in differences(peft, outcomes):
        assert difference.max() < 2e-4


@needs_packing
@pytest.mark.usefixtures("helpers")
async def test_crowd_in_one_native_call_gets_the_bits_of_kernels_one_by_one_and_is_near_peft(
    family: str,
    directory: Path,
    peft: PeftModel,
    native_passes: list[NativeLayers],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcomes = await serve(directory, dtype="bfloat16")
    assert len(native_passes) > NUM_TOKENS
    for difference in differences(peft, outcomes):
        assert difference.mean() < (MAX_SHORTFALL_OF_MIXTURE if family in MIXTURES else MAX_SHORTFALL)
    monkeypatch.setattr(NativeLayer, "can_compute", lambda *_: False)
    native_passes.clear()
    again = await serve(directory, dtype="bfloat16")
    assert not native_passes
    for ours, theirs in zip(outcomes, again, strict=True):
        assert torch.equal(logprobs_of(ours), logprobs_of(theirs)) and ours.tokens == theirs.tokens
