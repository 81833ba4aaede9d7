"""What cannot be served is refused when the server starts, in one line that says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from tiny_models import CONFIGS, CONTEXT, make_tiny_model, save_tiny_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    BloomConfig,
    CLIPConfig,
    DogeConfig,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    OlmoeConfig,
    PhimoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    T5Config,
    WhisperConfig,
)

from fusionserve.config import EngineConfig
from fusionserve.engine.async_engine import AsyncEngine
from fusionserve.engine.base_model import load_base_model
from fusionserve.engine.device import find_device
from fusionserve.engine.rotary_table import RotaryTable
from fusionserve.errors import PreconditionError, StartupError
from fusionserve.generation import (
    GenerateParams,
    GenerationFinished,
    SamplingParams,
    StoppingCriteria,
    TextPrompt,
    TokenPrompt,
)
from fusionserve.metrics import AdapterLabels

_SIZES = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_WINDOWED = {**_SIZES, "sliding_window": 8}
_STATE = {"vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 2}


def _jamba() -> PreTrainedConfig:
    """One layer of attention, one of a state space."""
    return JambaConfig(
        **_SIZES, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=4, mamba_dt_rank=4
    )


def _qwen2_moe() -> PreTrainedConfig:
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "shared_expert_intermediate_size": 16}
    return Qwen2MoeConfig(
        **_WINDOWED, use_sliding_window=True, max_window_layers=2, moe_intermediate_size=16, **experts
    )


UNSUPPORTED: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "ALiBi, Bloom": (
        lambda: BloomConfig(vocab_size=80, hidden_size=32, n_layer=2, n_head=4),
        "BloomForCausalLM cannot be served: its attention does not go through the attention interface",
    ),
    "ALiBi, MPT": (
        lambda: MptConfig(vocab_size=80, d_model=32, n_layers=2, n_heads=4, max_seq_len=CONTEXT),
        "MptForCausalLM cannot be served: its attention does not go through the attention interface",
    ),
    "state space": (lambda: MambaConfig(**_STATE), "it has linear_attention layers"),
    "state space and attention": (_jamba, "it has linear_attention layers"),
    "convolution and attention": (
        lambda: Lfm2Config(**_SIZES, full_attn_idxs=[1]),
        "it has conv layers",
    ),
    "not causal": (
        lambda: BertConfig(**{k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}),
        "BertLMHeadModel cannot be served: its attention is not causal",
    ),
    "attention to few of the tokens": (
        lambda: DogeConfig(**_SIZES, keep_window_size=2),
        "its attention takes more into account than is served (attention_mask)",
    ),
    "attention to few of the tokens, of more than the probe has": (
        lambda: DogeConfig(**_SIZES),
        "its attention takes more into account than is served (attention_mask)",
    ),
    "window that attention is not told of": (
        lambda: PhimoeConfig(**_WINDOWED, num_local_experts=2),
        "PhimoeForCausalLM cannot be served: its sliding window does not go through the attention interface",
    ),
    "window that attention alone is told of": (
        lambda: OlmoeConfig(**_WINDOWED, num_experts=2, num_experts_per_tok=1),
        "models of the type olmoe cannot be served: its attention is told of a sliding window",
    ),
    "window in some layers that attention is not told of": (
        _qwen2_moe,
        "Qwen2MoeForCausalLM cannot be served: its sliding window does not go through the attention interface",
    ),
}


@pytest.mark.parametrize("family", [BartConfig, WhisperConfig])
def test_decoder_of_an_encoder_decoder_is_refused(family: type[PreTrainedConfig], tmp_path: Path) -> None:
    sizes = {"d_model": 32, "decoder_layers": 1, "encoder_layers": 2, "decoder_attention_heads": 4}
    config = family(vocab_size=80, decoder_ffn_dim=32, pad_token_id=1, **sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    assert refusal(make_config(tmp_path)).reason == "ARCHITECTURE_UNSUPPORTED"


@pytest.mark.parametrize(("floor_scale", "is_served"), [(CONTEXT, False), (8192, True)])
def test_temperature_that_depends_on_the_place_in_a_batch_is_refused(
    floor_scale: int, is_served: bool, tmp_path: Path
) -> None:
    sizes = {**_SIZES, "intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8}
    layers = {"layer_types": ["full_attention"] * 2, "no_rope_layers": [0, 1], "attention_chunk_size": 8192}
    config = Llama4TextConfig(**sizes, **layers, attn_temperature_tuning=True, floor_scale=floor_scale)
    make_tiny_model(config).save_pretrained(tmp_path)
    if is_served:
        assert load_base_model(make_config(tmp_path)).max_context_tokens == CONTEXT
    else:
        assert "attn_temperature_tuning" in refusal(make_config(tmp_path)).message


@pytest.mark.parametrize(("make_model_config", "reason"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_unsupported_architecture_is_refused(
    make_model_config: Callable[[], PreTrainedConfig], reason: str, tmp_path: Path
) -> None:
    """With the library's small initial weights, where a wrong context changes the output least."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(make_model_config(), dtype=torch.float32).save_pretrained(tmp_path)
    error = refusal(make_config(tmp_path))
    assert error.reason == "ARCHITECTURE_UNSUPPORTED"
    assert reason in error.message


def test_window_longer_than_the_context_is_served(tmp_path: Path) -> None:
    config = PhimoeConfig(**_WINDOWED, num_local_experts=2)
    make_tiny_model(config).save_pretrained(tmp_path)
    assert load_base_model(replace(make_config(tmp_path), max_context_tokens=8)).max_context_tokens == 8


def test_model_that_fails_by_itself_is_refused(tmp_path: Path) -> None:
    """It asks for more experts per token than it has."""
    config = Qwen2MoeConfig(**_SIZES, num_experts=2, num_experts_per_tok=4)
    make_tiny_model(config).save_pretrained(tmp_path)
    error = refusal(make_config(tmp_path))
    why = "Qwen2MoeForCausalLM cannot be served: it fails on a short prompt: selected index k out of range"
    assert error.message.endswith(why)


def test_model_that_would_return_tuples_is_served(llama: Path) -> None:
    change_config(llama, return_dict=False)
    assert load_base_model(make_config(llama)).max_context_tokens == CONTEXT


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    T5Config(vocab_size=80, d_model=32, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    error = refusal(make_config(tmp_path))
    assert error.reason == "ARCHITECTURE_UNSUPPORTED"
    assert error.message == "models of the type t5 cannot be served: it is an encoder-decoder"


def test_model_without_text_generation_is_refused(llama: Path) -> None:
    CLIPConfig().save_pretrained(llama)
    error = refusal(make_config(llama))
    assert error.reason == "MODEL_UNUSABLE"
    assert "CLIPConfig" in error.message


def test_missing_directory_is_refused(tmp_path: Path, offline: None) -> None:
    error = refusal(make_config(tmp_path / "nothing"))
    assert error.reason == "MODEL_NOT_FOUND"
    assert "there is no such directory" in error.message


def test_hub_id_without_network_is_refused(offline: None) -> None:
    error = refusal(EngineConfig(model="someone/some-model", model_name="tiny"))
    assert error.reason == "MODEL_NOT_FOUND"
    assert error.message.startswith("cannot load model someone/some-model: ")
    assert "no network" in error.message


def test_file_instead_of_a_directory_is_refused(tmp_path: Path, offline: None) -> None:
    (tmp_path / "model").write_text("not a model")
    assert "it is not a directory" in refusal(make_config(tmp_path / "model")).message


def test_directory_without_config_is_refused(tmp_path: Path) -> None:
    assert "the directory has no config.json" in refusal(make_config(tmp_path)).message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "unheard-of"}, "`unheard-of`"),
        ({"model_type": "unheard-of", "auto_map": {"AutoConfig": "evil.Config"}}, "custom code"),
        ({"num_attention_heads": "many"}, "num_attention_heads"),
        ({"num_attention_heads": 5, "head_dim": None}, "attention heads (5)"),
    ],
)
def test_unusable_config_is_refused_by_name(changes: dict[str, object], reason: str, llama: Path) -> None:
    change_config(llama, **changes)
    error = refusal(make_config(llama))
    assert error.reason == "MODEL_NOT_FOUND"
    assert reason in error.message


@pytest.mark.parametrize("num_positions", [-1, 0, 1])
def test_context_without_room_for_an_answer_is_refused(num_positions: int, llama: Path) -> None:
    change_config(llama, max_position_embeddings=num_positions)
    error = refusal(make_config(llama))
    assert error.reason == "MODEL_UNUSABLE"
    assert f"max_position_embeddings is {num_positions}" in error.message


def test_config_that_is_not_json_is_refused(llama: Path) -> None:
    (llama / "config.json").write_text("{")
    assert "not a valid JSON file" in refusal(make_config(llama)).message


def test_directory_without_weights_is_refused(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    error = refusal(make_config(llama))
    assert error.reason == "MODEL_UNUSABLE"
    assert "no .safetensors files" in error.message


def test_pickled_weights_are_refused(llama: Path) -> None:
    state = load_base_model(make_config(llama)).model.state_dict()
    (llama / "model.safetensors").unlink()
    torch.save(state, llama / "pytorch_model.bin")
    error = refusal(make_config(llama))
    assert error.reason == "MODEL_UNUSABLE"
    assert "pickles are not read" in error.message


def test_error_that_is_a_mere_key_is_told_with_its_type(llama: Path) -> None:
    change_config(llama, rope_parameters={"rope_type": "bogus", "rope_theta": 1e4})
    error = refusal(make_config(llama))
    assert error.reason == "MODEL_UNUSABLE"
    assert error.message.endswith("KeyError: 'bogus'")


def test_index_without_files_is_refused(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "model-00001-of-00001.safetensors")
    (llama / "model.safetensors.index.json").write_text("{}")
    error = refusal(make_config(llama))
    assert error.reason == "MODEL_UNUSABLE"
    assert error.message.endswith("KeyError: 'weight_map'")


@pytest.mark.parametrize("num_bytes", [0, 4, 5000], ids="{} bytes".format)
def test_truncated_weights_are_refused(num_bytes: int, llama: Path) -> None:
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:num_bytes])
    assert refusal(make_config(llama)).reason == "MODEL_UNUSABLE"


def test_missing_parameters_are_refused_by_name(llama: Path) -> None:
    change_config(llama, num_hidden_layers=4)
    error = refusal(make_config(llama))
    assert error.reason == "MODEL_UNUSABLE"
    assert "do not have model.layers.3.input_layernorm.weight and 8 more" in error.message


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "llama", "opt"])
def test_tied_head_is_not_missed(architecture: str, tmp_path: Path) -> None:
    config = CONFIGS[architecture]()
    config.tie_word_embeddings = True
    make_tiny_model(config).save_pretrained(tmp_path)
    assert load_base_model(make_config(tmp_path)).modules.is_tied


def test_parameters_of_another_shape_are_refused_by_name(llama: Path) -> None:
    change_config(llama, intermediate_size=72)
    error = refusal(make_config(llama))
    assert error.reason == "MODEL_UNUSABLE"
    assert "another shape than config.json says for model.layers.0.mlp.down_proj.weight" in error.message


def test_context_longer_than_the_models_is_refused(llama: Path) -> None:
    error = refusal(replace(make_config(llama), max_context_tokens=CONTEXT + 1))
    assert error.reason == "CONTEXT_TOO_LONG"
    assert error.message == f"a context of {CONTEXT + 1} tokens is more than the model's {CONTEXT}"


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_longrope_is_served_up_to_its_original_length(place: str, tmp_path: Path) -> None:
    """Beyond, its frequencies depend on the longest request in the batch."""
    original = {"original_max_position_embeddings": 32}
    rope: dict[str, object] = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    make_tiny_model(LlamaConfig(**_SIZES, rope_parameters={**rope, **original})).save_pretrained(tmp_path)
    if place == "beside":
        change_config(tmp_path, rope_parameters=rope, **original)
    error = refusal(make_config(tmp_path))
    assert error.reason == "CONTEXT_TOO_LONG"
    assert "limit the context to 32" in error.message
    assert load_base_model(replace(make_config(tmp_path), max_context_tokens=32)).max_context_tokens == 32


def test_cache_smaller_than_a_context_is_refused(llama: Path) -> None:
    config = replace(make_config(llama), kv_cache_bytes=1 << 10)
    with pytest.raises(StartupError, match="one context of 96 tokens") as caught:
        AsyncEngine.load(config, AdapterLabels(8))
    assert caught.value.reason == "KV_CACHE_TOO_SMALL"


def test_context_without_room_is_refused_before_its_angles_are_computed(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number in config.json would take the host's memory."""
    lengths: list[int] = []
    make = RotaryTable.__init__

    def note(table: RotaryTable, embedding: nn.Module, max_positions: int, *rest: Any) -> None:
        lengths.append(max_positions)
        make(table, embedding, min(max_positions, CONTEXT), *rest)

    monkeypatch.setattr(RotaryTable, "__init__", note)
    load_base_model(make_config(llama))
    assert lengths == [CONTEXT]
    change_config(llama, max_position_embeddings=10**9)
    for num_bytes in (None, 1 << 20):
        error = refusal(replace(make_config(llama), kv_cache_bytes=num_bytes))
        assert error.reason == "KV_CACHE_TOO_SMALL"
        assert "for one context of 1000000000 tokens" in error.message
    assert lengths == [CONTEXT]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is one")
def test_gpu_that_is_not_there_is_refused(llama: Path) -> None:
    assert refusal(replace(make_config(llama), device="cuda")).reason == "DEVICE_UNAVAILABLE"
    assert find_device("auto").type == find_device("cpu").type == "cpu"


def test_unreadable_tokenizer_is_refused(llama: Path) -> None:
    (llama / "tokenizer.json").write_text("{")
    assert refusal(make_config(llama)).reason == "TOKENIZER_UNUSABLE"


async def test_model_without_tokenizer_serves_token_ids_only(llama: Path) -> None:
    engine = AsyncEngine.load(make_config(llama), AdapterLabels(8))
    await engine.start()
    try:
        params = GenerateParams(
            request_id="tokens",
            prompt=TokenPrompt((5, 6, 7)),
            sampling=SamplingParams(temperature=0.0),
            stopping=StoppingCriteria(max_new_tokens=3, ignore_eos=True),
        )
        *_, finished = [event async for event in engine.generate(params)]
        assert isinstance(finished, GenerationFinished)
        assert len(finished.candidates[0].token_ids) == 3
        assert finished.candidates[0].text == ""
        with pytest.raises(PreconditionError) as caught:
            async for _ in engine.generate(replace(params, request_id="text", prompt=TextPrompt("hello"))):
                pass
        assert caught.value.reason == "NO_TOKENIZER"
        assert not engine.model_info().has_tokenizer
    finally:
        await engine.close()


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "llama")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def make_config(directory: Path) -> EngineConfig:
    return EngineConfig(model=str(directory), model_name="tiny", dtype="float32", num_threads=1)


def refusal(config: EngineConfig) -> StartupError:
    """The error that loading ends with: one line, and no longer than fits a terminal's few."""
    with pytest.raises(StartupError) as caught:
        load_base_model(config)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 600
    return caught.value


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
