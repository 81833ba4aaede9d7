"""Fusions through the whole engine: equal to the unfolded model, the same in company, and safe over their members."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from served_adapters import (
    TestedEngine,
    blend,
    collect,
    collect_all,
    lora,
    make_model,
    make_params,
    make_prompt,
    running_engine,
    write_lora,
    write_model,
)
from served_fusions import MEMBERS, fusion, run_unfolded, write_fusion

from fusionserve.errors import (
    ArtifactError,
    InvalidRequestError,
    NotFoundError,
    StartupError,
)
from fusionserve.fusion.config import FusionConfig, FusionMember
from fusionserve.generation import Adaptation, OutputOptions

pytestmark = pytest.mark.gpu

PROMPT = (5, 9, 17, 4, 30, 22, 8)
NUM_TOKENS = 12
MAX_LOGPROB_ERROR = 2e-4


@pytest.fixture
def engine(fusion_engine: TestedEngine) -> TestedEngine:
    return fusion_engine


async def greedy(engine: TestedEngine, adaptation: Adaptation, **options: object) -> tuple[int, ...]:
    params = make_params("alone", adaptation, PROMPT, num_tokens=NUM_TOKENS, **options)  # type: ignore[arg-type]
    return (await collect(engine, params)).tokens


@pytest.mark.parametrize("name", ["mix", "duo"])
async def test_served_fusion_equals_the_unfolded_model(
    engine: TestedEngine, adapters: Path, fusions: Path, name: str
) -> None:
    output = OutputOptions(logprobs=3, prompt_logprobs=0)
    outcome = await collect(engine, make_params("one", fusion(name), PROMPT, output=output))
    tokens = (*PROMPT, *outcome.tokens)
    expected = run_unfolded(make_model("llama"), adapters, fusions / name, tokens).logprobs
    for position, row in enumerate(outcome.finished.candidates[0].logprobs, len(PROMPT) - 1):
        assert row.chosen.token_id == int(expected[position].argmax())
        for token in (row.chosen, *row.top):
            assert abs(token.logprob - float(expected[position, token.token_id])) < MAX_LOGPROB_ERROR
    for position, row in enumerate(outcome.finished.prompt_logprobs):
        assert abs(row.chosen.logprob - float(expected[position, PROMPT[position + 1]])) < MAX_LOGPROB_ERROR


async def test_crowd_of_all_kinds_gets_the_tokens_it_gets_alone(engine: TestedEngine) -> None:
    kinds = [
        Adaptation(),
        lora("ada"),
        lora("cid", 0.5),
        blend(ada=0.3, bea=0.9),
        fusion("mix"),
        fusion("mix", "bea"),
        fusion("duo"),
        fusion("duo", "ada"),
    ]
    requests = [
        make_params(f"r{i}-{j}", kind, make_prompt(j, 9 + 5 * i), num_tokens=NUM_TOKENS)
        for i, kind in enumerate(kinds)
        for j in range(2)
    ]
    alone = [(await collect(engine, request)).tokens for request in requests]
    together = await collect_all(engine, requests)
    assert [outcome.tokens for outcome in together] == alone
    assert len({tokens for tokens in alone}) == len(alone)


async def test_excluding_all_but_one_member_equals_that_adapter(engine: TestedEngine) -> None:
    assert await greedy(engine, fusion("mix", "ada", "cid")) == await greedy(engine, lora("bea"))


async def test_mask_and_version_never_share_the_prefix_cache(
    engine: TestedEngine, adapters: Path, fusions: Path
) -> None:
    prompt = make_prompt(3, 40)

    async def run(adaptation: Adaptation) -> tuple[int, tuple[int, ...]]:
        outcome = await collect(engine, make_params("x", adaptation, prompt, num_tokens=NUM_TOKENS))
        return outcome.finished.usage.cached_tokens, outcome.tokens

    first = await run(fusion("mix"))
    assert first[0] == 0
    assert await run(fusion("mix")) == (32, first[1])
    assert (await run(fusion("mix", "ada")))[0] == 0
    write_fusion(fusions, "mix", MEMBERS, adapters, seed=9)
    reloaded = await engine.load_fusion("mix", None, pin=False, replace=True)
    assert reloaded.version == 2
    cached, tokens = await run(fusion("mix"))
    assert cached == 0
    assert tokens != first[1]


async def test_fusion_that_overflows_when_it_is_folded_is_refused(
    engine: TestedEngine, adapters: Path, fusions: Path
) -> None:
    write_fusion(fusions, "bad", MEMBERS[:1], adapters, seed=3, temperature=1e-40)
    with pytest.raises(ArtifactError) as caught:
        await engine.load_fusion("bad", None, pin=False, replace=False)
    assert caught.value.reason == "NOT_FINITE"
    assert engine.registry.num_leases == 0


@pytest.mark.parametrize("is_told", [True, False])
async def test_fusion_over_a_member_of_another_scaling_is_refused_if_it_tells(
    engine: TestedEngine, adapters: Path, fusions: Path, is_told: bool
) -> None:
    """The weights are the same file; only the fusion's digest of the scalings can tell."""
    member = write_lora(adapters / "dan", seed=7)
    config = write_fusion(fusions, "scaled", ("dan",), adapters, seed=3)
    if not is_told:  # as fusions had it before
        old = replace(config, members=(FusionMember("dan", config.members[0].digest),))
        (fusions / "scaled" / "fusion_config.json").write_text(old.to_json())
    fields = json.loads((member / "adapter_config.json").read_text())
    (member / "adapter_config.json").write_text(json.dumps({**fields, "use_rslora": True}))
    if not is_told:
        assert (await engine.load_fusion("scaled", None, pin=False, replace=False)).version == 1
        return
    with pytest.raises(ArtifactError, match="member dan is scaled otherwise") as caught:
        await engine.load_fusion("scaled", None, pin=False, replace=False)
    assert caught.value.reason == "MEMBER_DIGEST_MISMATCH"
    assert engine.registry.num_leases == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base_fingerprint": "0" * 64}, "WRONG_BASE_MODEL"),
        ({"members": (FusionMember("ada", "0" * 64),)}, "MEMBER_DIGEST_MISMATCH"),
        ({"members": (FusionMember("nobody", "0" * 64),)}, "MEMBER_MISSING"),
        ({"modules": ("model.layers.0.self_attn.z_proj",)}, "UNKNOWN_MODULE"),
    ],
)
async def test_unusable_fusion_is_refused_and_its_members_are_let_go(
    engine: TestedEngine, adapters: Path, fusions: Path, changes: dict[str, object], reason: str
) -> None:
    config = write_fusion(fusions, "bad", MEMBERS[:1], adapters, seed=3)
    text = FusionConfig(**{**{f: getattr(config, f) for f in config.__slots__}, **changes}).to_json()
    (fusions / "bad" / "fusion_config.json").write_text(text)
    with pytest.raises(ArtifactError) as caught:
        await engine.load_fusion("bad", None, pin=False, replace=False)
    assert caught.value.reason == reason
    assert engine.registry.num_leases == 0


async def test_number_that_is_too_large_is_malformed(
    engine: TestedEngine, adapters: Path, fusions: Path
) -> None:
    write_fusion(fusions, "bad", MEMBERS[:1], adapters, seed=3)
    file = fusions / "bad" / "fusion_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "temperature": 10**400}))
    with pytest.raises(ArtifactError) as caught:
        await engine.load_fusion("bad", None, pin=False, replace=False)
    assert caught.value.reason == "CONFIG_MALFORMED"


async def test_module_that_no_member_adapts_is_refused(
    engine: TestedEngine, adapters: Path, fusions: Path
) -> None:
    write_fusion(fusions, "bad", MEMBERS[:1], adapters, seed=3, modules=("model.layers.0.mlp.up_proj",))
    with pytest.raises(ArtifactError) as caught:
        await engine.load_fusion("bad", None, pin=False, replace=False)
    assert caught.value.reason == "UNKNOWN_MODULE"
    assert engine.registry.num_leases == 0


async def test_name_of_the_base_is_refused(engine: TestedEngine, fusions: Path) -> None:
    with pytest.raises(InvalidRequestError) as loaded:
        await engine.load_fusion("tiny", "mix", pin=False, replace=False)
    with pytest.raises(InvalidRequestError) as used:
        await greedy(engine, fusion("tiny"))
    assert loaded.value.reason == used.value.reason == "FUSION_ID_INVALID"


@pytest.mark.parametrize("noun", ["adapter", "fusion"])
async def test_name_of_the_base_stops_the_start(
    tmp_path: Path, adapters: Path, fusions: Path, noun: str
) -> None:
    named = {"adapter": adapters / "ada", "fusion": fusions / "mix"}[noun]
    model = write_model(tmp_path / "model")
    with pytest.raises(StartupError, match=f"{noun} tiny: this is the base model's name") as caught:
        async with running_engine(model, adapters, **{f"{noun}s": (("tiny", named),)}):
            pass
    assert caught.value.reason == f"{noun.upper()}_ID_INVALID"


async def test_bad_requests_are_refused(engine: TestedEngine) -> None:
    with pytest.raises(NotFoundError):
        await greedy(engine, fusion("nobody"))
    for excluded, reason in ((("zoe",), "UNKNOWN_MEMBER"), (MEMBERS, "NO_MEMBER_LEFT")):
        with pytest.raises(InvalidRequestError) as caught:
            await greedy(engine, fusion("mix", *excluded))
        assert caught.value.reason == reason
