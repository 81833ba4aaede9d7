"""Every served adapter feature through the whole engine against PEFT: greedy tokens exactly, logits to 2e-4.

The adapters are made and saved by PEFT and read back by PEFT for the oracle. The prompt's log-probabilities are asked
for with the whole vocabulary as alternatives, so every logit is compared, up to the constant softmax does not see.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft_adapters import quiet_peft, randomize, reload, save, wrap
from served_adapters import (
    VOCAB,
    Outcome,
    TestedEngine,
    blend,
    check_at_rest,
    collect,
    collect_all,
    lora,
    make_model,
    make_params,
    make_prompt,
    running_engine,
    write_model,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from fusionserve.errors import NotFoundError, PreconditionError
from fusionserve.generation import Adaptation, AdapterTerm, GenerateParams, OutputOptions, TokenLogprobs

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.gpu]

TOLERANCE = 2e-4
NUM_TOKENS = 10
EVERYTHING = OutputOptions(logprobs=VOCAB, prompt_logprobs=VOCAB)
CONTINUATION = OutputOptions(logprobs=VOCAB)  # the LM head then sees a few of the batch's tokens only
ATTENTION = ["q_proj", "v_proj"]

_LLAMA: dict[str, dict[str, object]] = {
    "plain": {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 8},
    "rslora": {"target_modules": ATTENTION, "use_rslora": True, "r": 9, "lora_alpha": 3},
    "rank_pattern": {"target_modules": "all-linear", "rank_pattern": {"down_proj": 7, r"layers\.0\..*": 1}},
    "alpha_pattern": {
        "target_modules": ATTENTION,
        "lora_alpha": 2,
        "alpha_pattern": {"layers.1.self_attn.q_proj": 16, "v_proj": 5},
    },
    "layers_to_transform": {"target_modules": ["up_proj", "o_proj"], "layers_to_transform": [1]},
    "regex": {"target_modules": r".*layers\.0\.(self_attn\.k|mlp\.gate)_proj"},
    "all_linear": {"target_modules": "all-linear", "r": 2},
    "lora_bias": {"target_modules": ["v_proj", "gate_proj"], "lora_bias": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "r": 3},
    "lm_head": {"target_modules": ["lm_head", "k_proj"], "lora_alpha": 4},
    "saved_head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved_embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved_both": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "pissa": {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa"},
    "olora": {"target_modules": ATTENTION, "init_lora_weights": "olora"},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "dora_head": {"target_modules": ["lm_head", "v_proj"], "use_dora": True, "lora_alpha": 6},
}
_TIED_LLAMA: dict[str, dict[str, object]] = {
    "plain": _LLAMA["plain"],
    "embedding": _LLAMA["embedding"],
    "lm_head": _LLAMA["lm_head"],
    "tied_embedding": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "saved_head": _LLAMA["saved_head"],
    "saved_embedding": _LLAMA["saved_embedding"],
    "saved_both": _LLAMA["saved_both"],
    "tied_saved": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "dora": _LLAMA["dora"],
}
_CONV1D = {"fan_in_fan_out": True}
_GPT2: dict[str, dict[str, object]] = {
    "plain": {"target_modules": ["c_attn"], "lora_alpha": 8, **_CONV1D},
    "all_linear": {"target_modules": "all-linear", "rank_pattern": {"c_fc": 6}, **_CONV1D},
    "lora_bias": {"target_modules": ["c_fc"], "lora_bias": True, **_CONV1D},
    "embedding": {"target_modules": ["wte"]},
    "saved_head": {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"], **_CONV1D},
    "dora": {"target_modules": ["c_attn", "c_proj"], "use_dora": True, **_CONV1D},
}
_PHI: dict[str, dict[str, object]] = {
    "plain": {"target_modules": ["q_proj", "fc2"], "lora_alpha": 8},
    "embedding": _LLAMA["embedding"],
    "lm_head": _LLAMA["lm_head"],
    "saved_head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "dora_head": {"target_modules": ["lm_head", "v_proj"], "use_dora": True, "lora_alpha": 6},
}
ADAPTERS = {"llama": _LLAMA, "tied_llama": _TIED_LLAMA, "gpt2": _GPT2, "phi": _PHI}
CASES = [(family, name) for family, adapters in ADAPTERS.items() for name in adapters]


@dataclass(frozen=True, slots=True)
class Family:
    """A base on disk, its adapters by PEFT, and an engine that serves them."""

    model: PreTrainedModel
    root: Path
    engine: TestedEngine

    def peft_model(self, adaptation: Adaptation) -> nn.Module:
        """PEFT's model with the terms' adapters active and their scaling multiplied by the terms' scales."""
        if not adaptation.terms:
            return self.model
        first, *others = adaptation.terms
        with quiet_peft():
            peft_model = PeftModel.from_pretrained(
                copy.deepcopy(self.model), str(self.root / first.name), adapter_name=first.name
            )
            for term in others:
                peft_model.load_adapter(str(self.root / term.name), adapter_name=term.name)
            peft_model.base_model.set_adapter([term.name for term in adaptation.terms])
        scales = {term.name: term.scale for term in adaptation.terms}
        for module in peft_model.modules():
            if isinstance(module, LoraLayer):
                module.scaling = {name: s * scales[name] for name, s in module.scaling.items()}
        return peft_model.eval()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def families(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mapping[str, Family]]:
    """One engine per family for all tests; 11 tokens per step cut every prompt into chunks."""
    async with AsyncExitStack() as engines:
        found = {}
        for name, adapters in ADAPTERS.items():
            path = tmp_path_factory.mktemp(name)
            base, model, root = make_model(name), write_model(path / "tiny", name), path / "adapters"
            for seed, (adapter, options) in enumerate(adapters.items(), start=1):
                write_peft_adapter(base, root / adapter, seed, options)
            serving = running_engine(model, root, max_batch_tokens=11, adapter_pool_ranks=150)
            found[name] = Family(base, root, await engines.enter_async_context(serving))
        yield found


@pytest.fixture
def llama(families: Mapping[str, Family]) -> Family:
    """The family with every feature."""
    return families["llama"]


def write_peft_adapter(
    base: PreTrainedModel, directory: Path, seed: int, options: Mapping[str, object]
) -> None:
    """An adapter with random weights, B included; PiSSA and OLoRA in the converted form."""
    peft_model = wrap(base, **options)
    init = options.get("init_lora_weights")
    if init is None:
        randomize(peft_model, seed=seed)
        save(peft_model, directory)
        return
    config = peft_model.peft_config["default"]
    config.init_lora_weights = True
    start = save(peft_model, directory.parent.parent / f"{directory.name}-start")
    config.init_lora_weights = init
    randomize(peft_model, seed=seed)
    save(peft_model, directory, path_initial_model_for_weight_conversion=str(start))


def peft_logprobs(model: nn.Module, token_ids: list[int]) -> Tensor:
    """Log-probabilities [tokens, vocab] of what follows each token."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    return torch.log_softmax(logits, dim=-1)


def peft_greedy(model: nn.Module, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """The most likely continuation, one full forward pass per token."""
    token_ids = list(prompt)
    for _ in range(NUM_TOKENS):
        token_ids.append(int(peft_logprobs(model, token_ids)[-1].argmax()))
    return tuple(token_ids[len(prompt) :])


def assert_equals_peft(outcome: Outcome, model: nn.Module, prompt: tuple[int, ...]) -> None:
    """Tokens exactly, every log-probability of prompt and continuation to the tolerance."""
    assert outcome.tokens == peft_greedy(model, prompt)
    prompt_logprobs = outcome.finished.prompt_logprobs
    assert len(prompt_logprobs) in (0, len(prompt) - 1)
    reported = (*prompt_logprobs, *outcome.finished.candidates[0].logprobs)
    token_ids = [*prompt, *outcome.tokens]
    expected = peft_logprobs(model, token_ids)[-len(reported) - 1 : -1]
    assert len(reported) == len(prompt_logprobs) + NUM_TOKENS
    for following, ours, theirs in zip(token_ids[-len(reported) :], reported, expected, strict=True):
        assert ours.chosen.token_id == following
        torch.testing.assert_close(_by_token(ours), theirs, atol=TOLERANCE, rtol=0)
        assert ours.chosen.logprob == pytest.approx(theirs[following].item(), abs=TOLERANCE)


def _by_token(logprobs: TokenLogprobs) -> Tensor:
    values = torch.full((VOCAB,), float("nan"))
    for entry in logprobs.top:
        values[entry.token_id] = entry.logprob
    return values


def ask(name: str, adaptation: Adaptation, prompt: tuple[int, ...]) -> GenerateParams:
    return make_params(name, adaptation, prompt, num_tokens=NUM_TOKENS, output=EVERYTHING)


@pytest.mark.parametrize(("of", "name"), CASES, ids=["-".join(case) for case in CASES])
async def test_adapter_alone_equals_peft(families: Mapping[str, Family], of: str, name: str) -> None:
    family = families[of]
    prompt = make_prompt(3, 13)
    outcome = await collect(family.engine, ask("alone", lora(name), prompt))
    base = await collect(family.engine, ask("base", Adaptation(), prompt))
    assert_equals_peft(outcome, reload(family.model, family.root / name), prompt)
    assert_equals_peft(base, family.model, prompt)
    assert outcome.finished.prompt_logprobs != base.finished.prompt_logprobs, "the adapter changes nothing"
    await check_at_rest(family.engine)


@pytest.mark.parametrize("of", ADAPTERS)
async def test_crowded_batch_equals_peft(families: Mapping[str, Family], of: str) -> None:
    """Base, every adapter, scales and blends at once, each request in chunks, in one batch."""
    family = families[of]
    names = sorted(path.name for path in family.root.iterdir())
    adaptations = [Adaptation(), *(lora(name) for name in names), Adaptation()]
    adaptations += [lora("plain", 0.25), lora("embedding", -1.5), blend(plain=0.75, embedding=-0.5)]
    prompts = [make_prompt(seed, 5 + seed % 9) for seed in range(len(adaptations))]
    asked = [
        replace(ask(f"crowd-{i}", adaptation, prompt), output=CONTINUATION if i % 4 else EVERYTHING)
        for i, (adaptation, prompt) in enumerate(zip(adaptations, prompts, strict=True))
    ]
    outcomes = await collect_all(family.engine, asked)
    for outcome, adaptation, prompt in zip(outcomes, adaptations, prompts, strict=True):
        assert_equals_peft(outcome, family.peft_model(adaptation), prompt)
    alone = await collect(family.engine, ask("alone", Adaptation(), prompts[0]))
    assert alone.tokens == outcomes[0].tokens
    await check_at_rest(family.engine)


@pytest.mark.parametrize("of", ["llama", "gpt2"])
@pytest.mark.parametrize("scale", [0.0, 0.5, -2.0, 3.0])
async def test_scale_of_request_multiplies_scaling(
    families: Mapping[str, Family], of: str, scale: float
) -> None:
    family = families[of]
    prompt = make_prompt(11)
    for name in ("plain", "lora_bias", "embedding", "saved_head"):
        outcome = await collect(family.engine, ask(name, lora(name, scale), prompt))
        assert_equals_peft(outcome, family.peft_model(lora(name, scale)), prompt)
    await check_at_rest(family.engine)


BLENDS = {
    "two": blend(plain=0.5, rslora=0.5),
    "negative": blend(plain=1.0, all_linear=-0.75),
    "overlapping": blend(rank_pattern=0.6, all_linear=0.4, alpha_pattern=-0.2, lora_bias=2.0),
    "vocabulary": blend(embedding=0.7, lm_head=-1.2, plain=0.1),
    "one": blend(plain=0.3),
}


@pytest.mark.parametrize("adaptation", BLENDS.values(), ids=BLENDS)
async def test_blend_equals_weighted_sum_of_deltas(llama: Family, adaptation: Adaptation) -> None:
    prompt = make_prompt(21, 12)
    outcome = await collect(llama.engine, ask("blend", adaptation, prompt))
    assert_equals_peft(outcome, llama.peft_model(adaptation), prompt)
    assert outcome.finished.adaptation.kind == "blend"
    assert [member.scale for member in outcome.finished.adaptation.members] == [
        term.scale for term in adaptation.terms
    ]
    await check_at_rest(llama.engine)


async def test_member_named_twice_counts_twice(llama: Family) -> None:
    prompt = make_prompt(22)
    twice = Adaptation("blend", (AdapterTerm("regex", 0.75), AdapterTerm("regex", 0.5)))
    outcome = await collect(llama.engine, ask("twice", twice, prompt))
    assert_equals_peft(outcome, llama.peft_model(lora("regex", 1.25)), prompt)
    await check_at_rest(llama.engine)


@pytest.mark.parametrize("member", ["dora", "saved_head", "saved_embedding"])
async def test_blend_of_whole_module_changes_is_refused(llama: Family, member: str) -> None:
    with pytest.raises(PreconditionError, match=member) as refusal:
        await collect(llama.engine, make_params("refused", blend(**{"plain": 0.5, member: 0.5})))
    assert refusal.value.reason == "BLEND_UNSUPPORTED"
    await check_at_rest(llama.engine)


async def test_scaled_dora_is_refused(llama: Family) -> None:
    with pytest.raises(PreconditionError) as refusal:
        await collect(llama.engine, make_params("refused", lora("dora", 0.5)))
    assert refusal.value.reason == "SCALE_UNSUPPORTED"
    await check_at_rest(llama.engine)


@pytest.mark.parametrize("adaptation", [lora("nobody"), blend(plain=0.5, nobody=0.5)], ids=["lora", "blend"])
async def test_unknown_adapter_is_not_found(llama: Family, adaptation: Adaptation) -> None:
    with pytest.raises(NotFoundError) as refusal:
        await collect(llama.engine, make_params("unknown", adaptation))
    assert refusal.value.resource_name == "nobody"
    await check_at_rest(llama.engine)
