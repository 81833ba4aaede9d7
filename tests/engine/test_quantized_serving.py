"""A base in few bits serves what PEFT computes on the same base, in any company, and is otherwise the same base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from few_bits_models import (
    HIDDEN,
    INNER,
    VOCAB,
    make_model,
    model_in_few_bits,
    nf4_model,
    served_by_peft,
)
from peft import PeftModel
from peft_adapters import quiet_peft, randomize, save, wrap
from served_adapters import (
    Outcome,
    TestedEngine,
    blend,
    collect,
    collect_all,
    lora,
    make_params,
    make_prompt,
    running_engine,
)
from tiny_models import CONFIGS, make_tiny_model
from tiny_training import LETTERS, adapter_run, optimization, write_texts
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
)

from fusionserve import metrics
from fusionserve.adapters.base_modules import describe_base_modules
from fusionserve.adapters.lora_loader import WEIGHTS_FILE
from fusionserve.config import EMBEDDED_MODEL, EngineConfig
from fusionserve.engine import quantized_base
from fusionserve.engine.base_model import load_base_model
from fusionserve.engine.quantized_base import BITS
from fusionserve.errors import StartupError
from fusionserve.fusion.artifact import save_fusion
from fusionserve.fusion.config import FusionConfig, FusionMember
from fusionserve.fusion.params import make_params as make_fusion_params
from fusionserve.generation import Adaptation, OutputOptions
from fusionserve.kernels import quantized_linear
from fusionserve.kernels.native_library import native_library
from fusionserve.training.adapter_training import train_adapter

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:builtin type .* has no __module__ attribute:DeprecationWarning",
    "ignore::UserWarning:peft",
)

TOLERANCE = 2e-4  # of log-probabilities in float32, as on an unquantized base
LARGEST_STEP = 0.1  # inputs in 8 bits: what a last digit that decides a rounding moves here and there
# In bfloat16 each product rounds to 8 bits; by how much that moves a log-probability: as much as in PEFT, and at worst.
BFLOAT16_OF_PEFT, BFLOAT16_LARGEST = 1.1, 0.2
EVERYTHING = OutputOptions(logprobs=VOCAB, prompt_logprobs=VOCAB)

ADAPTERS: dict[str, dict[str, dict[str, object]]] = {
    "llama": {
        "plain": {"target_modules": "all-linear", "lora_alpha": 8},
        "dora": {"target_modules": ["q_proj", "up_proj", "down_proj"], "use_dora": True},
        "lm_head": {"target_modules": ["lm_head", "k_proj"]},
        "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
        "saved_head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    },
    "gpt2": {
        "plain": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
        "dora": {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True},
    },
}


def write_adapter(directory: Path, family: str, seed: int, options: Mapping[str, object]) -> Path:
    """An adapter with random weights over the unquantized base, by PEFT."""
    adapted = wrap(make_model(family), **options)
    randomize(adapted, seed=seed)
    return save(adapted, directory)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and its adapters, made over the unquantized base, of either family."""
    found = {}
    for family, adapters in ADAPTERS.items():
        found[family] = tmp_path_factory.mktemp(family)
        make_model(family).save_pretrained(found[family] / "tiny")
        for seed, (name, options) in enumerate(adapters.items(), start=1):
            write_adapter(found[family] / "adapters" / name, family, seed, options)
    return found


def peft_logprobs(model: torch.nn.Module, token_ids: tuple[int, ...]) -> Tensor:
    """Log-probabilities [tokens, vocab] of what follows each token."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


def errors(outcome: Outcome, model: torch.nn.Module, prompt: tuple[int, ...]) -> Tensor:
    """How far the server is from `model`, for every chosen token of prompt and continuation and its alternatives."""
    expected = peft_logprobs(model, (*prompt, *outcome.tokens))
    found = reported(outcome, prompt)
    return torch.tensor([abs(logprob - float(expected[place])) for place, logprob in found])


def reported(outcome: Outcome, prompt: tuple[int, ...]) -> list[tuple[tuple[int, int], float]]:
    """Position and token id, and the log-probability, of all that the server reported."""
    rows = (*outcome.finished.prompt_logprobs, *outcome.finished.candidates[0].logprobs)
    assert len(rows) == len(prompt) + len(outcome.tokens) - 1
    entries = ((position, entry) for position, row in enumerate(rows) for entry in (row.chosen, *row.top))
    return [((position, entry.token_id), entry.logprob) for position, entry in entries]


def distances(
    outcome: Outcome, one: torch.nn.Module, other: torch.nn.Module, prompt: tuple[int, ...]
) -> Tensor:
    """How far two models are from one another for the same tokens."""
    some, others = (peft_logprobs(model, (*prompt, *outcome.tokens)) for model in (one, other))
    return torch.stack([(some[place] - others[place]).abs() for place, _ in reported(outcome, prompt)])


@pytest.mark.parametrize("bits", ["nf4", *BITS])
@pytest.mark.parametrize("family", ADAPTERS)
async def test_served_adapters_equal_peft_on_the_same_base(
    families: dict[str, Path], family: str, bits: str
) -> None:
    root, prompt = families[family], make_prompt(3, 13)
    kinds = {"base": Adaptation(), **{name: lora(name) for name in ADAPTERS[family]}}
    async with running_engine(root / "tiny", root / "adapters", quantize=bits) as engine:
        outcomes = {
            name: await collect(engine, make_params(name, kind, prompt, output=EVERYTHING))
            for name, kind in kinds.items()
        }
    for name, outcome in outcomes.items():
        found = errors(outcome, oracle_of(root, name, bits), prompt)
        assert float(found.median()) < TOLERANCE, name
        assert float(found.max()) < (TOLERANCE if bits == "nf4" else LARGEST_STEP), name
        is_base = outcome.finished.prompt_logprobs == outcomes["base"].finished.prompt_logprobs
        assert is_base == (name == "base"), name


def oracle_of(root: Path, name: str, bits: str) -> torch.nn.Module:
    """The base, or PEFT's model of an adapter over it."""
    if name == "base":
        return model_in_few_bits(root / "tiny", bits)
    return served_by_peft(root / "tiny", root / "adapters" / name, bits)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter trained over NF4 on the embedded base."""
    root = tmp_path_factory.mktemp("trained")
    data = write_texts(root / "letters.jsonl", LETTERS)
    run = adapter_run(root, data, "q", model=None, quantize="nf4", optimization=optimization(3))
    train_adapter(run)
    return root


def trained_by_peft(trained: Path, quantize: str, dtype: torch.dtype) -> torch.nn.Module:
    """The adapter on either base, by PEFT."""
    if quantize == "nf4":
        model = nf4_model(EMBEDDED_MODEL, dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=dtype).eval()
    with quiet_peft():
        return PeftModel.from_pretrained(model, str(trained / "q")).eval()


@pytest.mark.parametrize(
    ("quantize", "dtype"),
    [("nf4", "float32"), ("nf4", "bfloat16"), ("none", "bfloat16"), ("none", "float32")],
)
async def test_adapter_trained_over_nf4_serves_on_either_base(
    trained: Path, quantize: str, dtype: str
) -> None:
    """With PEFT on the same base as the oracle; in bfloat16 the server is as near to it as PEFT in that type."""
    exact = trained_by_peft(trained, quantize, torch.float32)
    options = {"quantize": quantize, "dtype": dtype, "model_name": "fusionserve-tiny"}
    output = OutputOptions(logprobs=5, prompt_logprobs=5)
    prompts = [make_prompt(seed, 16) for seed in range(6)]
    async with running_engine(EMBEDDED_MODEL, trained, **options) as engine:
        outcomes = [
            await collect(engine, make_params(str(seed), lora("q"), prompt, output=output))
            for seed, prompt in enumerate(prompts)
        ]
        assert (engine.model_info().quantization, engine.model_info().dtype) == (quantize, dtype)
    found = torch.cat([errors(o, exact, p) for o, p in zip(outcomes, prompts, strict=True)])
    if dtype == "float32":
        assert float(found.max()) < TOLERANCE
        return
    rounded = trained_by_peft(trained, quantize, torch.bfloat16)
    usual = torch.cat([distances(o, rounded, exact, p) for o, p in zip(outcomes, prompts, strict=True)])
    assert float(found.mean()) < BFLOAT16_OF_PEFT * float(usual.mean())
    assert float(found.max()) < BFLOAT16_LARGEST


@pytest.fixture(params=["nf4", *BITS])
async def engine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TestedEngine]:
    """Adapters and a fusion that were made over the unquantized base, on the base in few bits."""
    if request.param in BITS and native_library() is None:
        pytest.skip("torch's operations differ in the last digit, which inputs in 8 bits make larger")
    model, adapters, members = tmp_path / "model", tmp_path / "adapters", []
    make_model("llama").save_pretrained(model)
    for seed, name in enumerate(("ada", "bea")):
        options = {"r": 2 + seed, "target_modules": ["q_proj", "down_proj"]}
        weights = write_adapter(adapters / name, "llama", seed, options) / WEIGHTS_FILE
        members.append(FusionMember(name, hashlib.sha256(weights.read_bytes()).hexdigest()))
    base = describe_base_modules(make_model("llama"), model_name="tiny")
    modules = tuple(path for path in base.by_path if path.endswith(("q_proj", "down_proj")))
    config = FusionConfig(
        name="mix",
        base_model="tiny",
        base_fingerprint=base.fingerprint,
        members=tuple(members),
        modules=modules,
        d_key=6,
    )
    torch.manual_seed(1)
    params = make_fusion_params(config, base)
    for _, parameter in params.named_tensors():
        parameter.data += torch.randn_like(parameter) * 0.5
    save_fusion(tmp_path / "fusions" / "mix", config, params)
    settings = {"fusion_dirs": (tmp_path / "fusions",), "max_batch_tokens": 24, "adapter_pool_ranks": 96}
    async with running_engine(model, adapters, quantize=request.param, **settings) as running:
        yield running
        await running.unload_fusion("mix", force=False)


async def test_crowd_of_all_kinds_gets_the_tokens_it_gets_alone(engine: TestedEngine) -> None:
    kinds = [Adaptation(), lora("ada"), lora("bea", 0.5), blend(ada=0.3, bea=0.9)]
    kinds += [
        Adaptation("fusion", fusion="mix"),
        Adaptation("fusion", fusion="mix", excluded_members=("ada",)),
    ]
    requests = [
        make_params(f"r{i}-{j}", kind, make_prompt(j, 9 + 5 * i), num_tokens=24)
        for i, kind in enumerate(kinds)
        for j in range(3)
    ]
    alone = [(await collect(engine, request)).tokens for request in requests]
    together = await collect_all(engine, requests)
    assert [outcome.tokens for outcome in together] == alone
    assert len(set(alone)) == len(alone)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_base_in_panels_is_the_same_base_in_less_memory(dtype: str, bits: str) -> None:
    plain, quantized = (
        load_base_model(
            EngineConfig(model=str(EMBEDDED_MODEL), model_name="tiny", dtype=dtype, quantize=some)
        )
        for some in ("none", bits)
    )
    assert quantized.modules == plain.modules  # the fingerprint and every path, kind and shape
    assert quantized.dtype == plain.dtype
    embedding = quantized.base_weight("model.embed_tokens")
    assert torch.equal(embedding, quantized.base_weight("lm_head"))  # tied, in 8 bits
    off = (embedding - plain.base_weight("model.embed_tokens")).float().abs().max()
    assert 0 < float(off) <= quantized.base_step("model.embed_tokens") == quantized.base_step("lm_head")
    assert plain.base_step("lm_head") == 0.0
    numbers = plain.weight_bytes / plain.dtype.itemsize
    num_bits = 8 * embedding.numel() + BITS[bits] * (numbers - embedding.numel()) + 0.5 * numbers
    assert quantized.weight_bytes < 1.02 * num_bits / 8  # 2 %: norms
    weights = [base.base_weight("model.layers.0.mlp.up_proj").float() for base in (plain, quantized)]
    error = float((weights[0] - weights[1]).norm() / weights[0].norm())
    assert 0 < error < {"int8": 0.01, "int4": 0.1}[bits]


async def test_base_without_a_product_of_bytes_computes_the_same(
    families: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (quantized_linear, quantized_base):
        monkeypatch.setattr(module, "has_quantized_product", lambda: False)
    root, prompt = families["llama"], make_prompt(3, 13)
    async with running_engine(root / "tiny", root / "adapters", quantize="int4") as engine:
        base = await collect(engine, make_params("one", Adaptation(), prompt, output=EVERYTHING))
    assert float(errors(base, model_in_few_bits(root / "tiny", "int4"), prompt).median()) < TOLERANCE
    assert "int4 weights many times slower" in caplog.text


def test_embedding_that_is_not_tied_stays_exact(families: dict[str, Path]) -> None:
    base = load_base_model(replace(config_of(families["llama"] / "tiny", "float32"), quantize="int8"))
    assert base.base_step("lm_head") > 0.0
    assert base.base_step("model.embed_tokens") == 0.0  # a copy of it in an adapter must be equal


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nf4_base_is_the_same_base_in_less_memory(dtype: str) -> None:
    plain, quantized = (
        load_base_model(
            EngineConfig(model=str(EMBEDDED_MODEL), model_name="tiny", dtype=dtype, quantize=quantize)
        )
        for quantize in ("none", "nf4")
    )
    assert quantized.modules == plain.modules  # the fingerprint and every path, kind and shape
    assert quantized.dtype == plain.dtype
    # A quarter of this base is its embedding, which stays as it is; 4.5 of 16 bits is what is left of the rest.
    embedding = plain.base_weight("model.embed_tokens").nbytes
    assert quantized.weight_bytes < embedding + 0.29 * (plain.weight_bytes - embedding)


async def test_bytes_of_the_weights_are_told(engine: TestedEngine) -> None:
    assert engine.model_info().weight_bytes == metrics.BASE_WEIGHT_BYTES._value.get()
    assert 0 < engine.model_info().weight_bytes < sum(p.nbytes for p in make_model("llama").parameters())
    assert (await collect(engine, make_params("one", Adaptation("fusion", fusion="mix")))).tokens


@pytest.mark.parametrize("bits", ["nf4", *BITS])
@pytest.mark.parametrize("architecture", ["gemma2", "gpt_neox", "mixtral", "opt", "phi3", "qwen2"])
def test_architectures_can_be_quantized(architecture: str, bits: str, tmp_path: Path) -> None:
    """Biases, LM heads of other names, tied ones of scaled embeddings, experts that are not quantized."""
    config = CONFIGS[architecture]()
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "ffn_dim": INNER,
        "word_embed_proj_dim": HIDDEN,
    }
    config.update({name: size for name, size in sizes.items() if hasattr(config, name)})
    make_tiny_model(config).save_pretrained(tmp_path)
    base = load_base_model(replace(config_of(tmp_path, dtype="float32"), quantize=bits))
    plain = load_base_model(replace(config_of(tmp_path, dtype="float32"), quantize="none"))
    assert base.modules == plain.modules
    assert base.weight_bytes < plain.weight_bytes


def config_of(directory: Path, dtype: str = "bfloat16") -> EngineConfig:
    return EngineConfig(model=str(directory), model_name="tiny", quantize="nf4", dtype=dtype, num_threads=1)


@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "QUANTIZATION_UNAVAILABLE",
            "this checkpoint is quantized already",
        ),
        ({"intermediate_size": 192}, "MODEL_UNUSABLE", "another shape than config.json says for"),
    ],
)
def test_unusable_checkpoint_is_refused(
    changes: dict[str, object], reason: str, message: str, tmp_path: Path
) -> None:
    make_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(StartupError, match=message) as caught:
        load_base_model(config_of(tmp_path))
    assert caught.value.reason == reason


@pytest.mark.parametrize(("bits", "multiple"), [("nf4", 64), ("int8", 32)])
def test_base_without_a_module_of_whole_blocks_is_refused(bits: str, multiple: int, tmp_path: Path) -> None:
    config = CONFIGS["llama"]()
    config.update({"hidden_size": 48, "head_dim": 12, "intermediate_size": 72})
    make_tiny_model(config).save_pretrained(tmp_path)
    with pytest.raises(StartupError, match=f"their inputs must be a multiple of {multiple}") as caught:
        load_base_model(replace(config_of(tmp_path), quantize=bits))
    assert caught.value.reason == "QUANTIZATION_UNAVAILABLE"
