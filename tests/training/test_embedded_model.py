"""The model that ships with the server is small, plain, and better with each adapter on its own domain."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from fusionserve.config import EMBEDDED, EMBEDDED_ADAPTERS, EMBEDDED_MODEL, EMBEDDED_MODEL_NAME
from fusionserve.training.perplexity import evaluate, evaluate_fusions, load_adapted, perplexity
from fusionserve.training.sample import NEUTRAL
from fusionserve.training.tokens import encode_file

pytestmark = pytest.mark.filterwarnings(  # PEFT reads it
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

MAX_BYTES = 30_000_000
MARGIN = 0.15
FUSION_MARGIN = 0.02  # above the best adapter, told no domain
NAMES = sorted(path.name for path in EMBEDDED_ADAPTERS.iterdir())


def adapter_config(name: str) -> dict[str, object]:
    loaded: dict[str, object] = json.loads((EMBEDDED_ADAPTERS / name / "adapter_config.json").read_text())
    return loaded


def files() -> list[Path]:
    return [path for path in EMBEDDED.rglob("*") if path.is_file()]


def test_everything_fits_the_size_limit() -> None:
    assert sum(path.stat().st_size for path in files()) <= MAX_BYTES


def test_no_text_file_names_a_machine_path() -> None:
    configs = [path for path in files() if path.suffix in (".json", ".md") and path.name != "tokenizer.json"]
    assert not [path for path in configs if re.search(r"/(work|tmp|home|root)\b", path.read_text())]


def test_base_is_a_grouped_query_llama_with_tied_embeddings() -> None:
    config = AutoConfig.from_pretrained(EMBEDDED_MODEL)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.tie_word_embeddings
    assert config.max_position_embeddings == 1024


def test_tokenizer_fits_the_base_and_gives_text_back() -> None:
    config = AutoConfig.from_pretrained(EMBEDDED_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    assert len(tokenizer) == config.vocab_size
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == config.bos_token_id == config.eos_token_id
    text = "  def f(x):\n\treturn x  # größer als 漢字\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_there_are_enough_adapters_of_mixed_rank() -> None:
    assert len(NAMES) >= 5
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", name) for name in NAMES)
    assert len({adapter_config(name)["r"] for name in NAMES}) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_adapter_folder_is_plain_peft(name: str) -> None:
    config = adapter_config(name)
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == EMBEDDED_MODEL_NAME
    assert config["target_modules"] == ["down_proj", "gate_proj", "o_proj", "up_proj"]
    assert {path.name for path in (EMBEDDED_ADAPTERS / name).iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.parametrize("name", NAMES)
def test_adapter_weights_are_finite_and_trained(name: str) -> None:
    with safe_open(EMBEDDED_ADAPTERS / name / "adapter_model.safetensors", "pt") as weights:
        tensors = {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert all(tensor.abs().max() > 0 for key, tensor in tensors.items() if "lora_B" in key)


def test_prompts_and_held_out_text_cover_every_adapter() -> None:
    assert set(json.loads((EMBEDDED / "prompts.json").read_text())) == {NEUTRAL, *NAMES}
    assert {path.stem for path in (EMBEDDED / "heldout").glob("*.txt")} == set(NAMES)
    assert all(path.stat().st_size > 40_000 for path in (EMBEDDED / "heldout").glob("*.txt"))


def test_peft_loads_every_adapter_onto_the_base() -> None:
    model, names = load_adapted(EMBEDDED)
    assert names == NAMES
    assert set(model.peft_config) == set(NAMES)


def test_every_adapter_lowers_perplexity_on_its_own_domain() -> None:
    table = evaluate(EMBEDDED, length=512, max_tokens=2048)  # the margins are wide
    gains = {domain: table.gain(domain) for domain in table.rows}
    assert {domain: gain for domain, gain in gains.items() if gain < MARGIN} == {}
    for domain, row in table.rows.items():
        alone = {name: value for name, value in row.items() if not name.startswith("fusion")}
        assert min(alone, key=alone.__getitem__) == domain, f"another model is better on {domain}"


def test_fusion_is_near_every_adapter_on_its_own_domain() -> None:
    size = {"length": 512, "max_tokens": 8192}  # as the model card
    fused = evaluate_fusions(EMBEDDED, NAMES, **size)
    model, _ = load_adapted(EMBEDDED)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    for domain in NAMES:
        model.set_adapter(domain)
        alone = perplexity(model, encode_file(EMBEDDED / "heldout" / f"{domain}.txt", tokenizer), **size)
        assert alone < 20
        assert fused[domain]["fusion domains"] < alone * (1 + FUSION_MARGIN)
