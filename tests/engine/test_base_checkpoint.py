"""Checkpoints that transformers would load as something else than the base they seem to be are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from lora_files import Q_PROJ, make_config, make_pair, write_adapter
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, CONTEXT, make_tiny_model
from tiny_training import LETTERS, write_base, write_texts
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fusionserve.config import EngineConfig
from fusionserve.engine.base_model import BaseModel, adapt_model, load_base_model
from fusionserve.engine.tokenizer import Tokenizer
from fusionserve.errors import StartupError, TrainingError
from fusionserve.server.main import main
from fusionserve.training.frozen_base import load_base

WEIGHTS = "model.safetensors"
QUANTIZATIONS = ("none", "int8", "nf4")


def config_of(directory: Path, quantize: str = "none") -> EngineConfig:
    return EngineConfig(model=str(directory), model_name="tiny", quantize=quantize, num_threads=1)


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A base whose folder also holds an adapter."""
    base = write_base(tmp_path / "base")
    write_adapter(base, config=make_config(target_modules=["q_proj"]), tensors=make_pair(Q_PROJ, 32, 32))
    return base


def test_transformers_gives_the_base_the_adapter_beside_it(beside: Path) -> None:
    assert AutoModelForCausalLM.from_pretrained(beside)._hf_peft_config_loaded


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_adapter_beside_the_served_base_is_refused(quantize: str, beside: Path) -> None:
    with pytest.raises(StartupError, match=r"adapter_config\.json\) beside the model") as caught:
        load_base_model(config_of(beside, quantize))
    assert caught.value.reason == "MODEL_UNUSABLE"


def test_adapter_that_transformers_found_elsewhere_is_refused(
    beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does for an id of a model hub."""
    monkeypatch.setattr("fusionserve.adapters.base_checkpoint.check_no_adapter_beside", lambda _: None)
    with pytest.raises(StartupError, match="beside the model") as caught:
        load_base_model(config_of(beside))
    assert caught.value.reason == "MODEL_UNUSABLE"
    with pytest.raises(TrainingError, match="beside the model"):
        load_base(str(beside))


def test_adapter_beside_the_base_of_a_run_is_refused(beside: Path) -> None:
    with pytest.raises(TrainingError, match=r"adapter_config\.json\) beside the model"):
        load_base(str(beside))


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
@pytest.mark.parametrize("method", ["bitsandbytes", "mxfp4"])
def test_quantized_checkpoint_is_refused(method: str, quantize: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "load_in_8bit": method == "bitsandbytes"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError, match="this checkpoint is quantized already") as caught:
        load_base_model(config_of(base, quantize))
    assert caught.value.reason == "QUANTIZATION_UNAVAILABLE"
    with pytest.raises(TrainingError, match="this checkpoint is quantized already"):
        load_base(str(base), quantize="none" if quantize == "int8" else quantize)


def leave_out_a_tensor(base: Path) -> None:
    tensors = load_file(base / WEIGHTS)
    del tensors["model.norm.weight"]
    write_weights(base, tensors)


def add_a_bias(base: Path) -> None:
    add(base, {f"{Q_PROJ}.bias": torch.ones(32)})


def add_scales(base: Path) -> None:
    """As beside weights that some tools quantize and hold in bfloat16."""
    add(base, {f"{Q_PROJ}.{scale}": torch.ones(()) for scale in ("input_scale", "weight_scale")})


def bring_to_float8(base: Path) -> None:
    """As tools do that write down in a file of their own how they did it."""
    scaled = load_file(base / WEIGHTS)[f"{Q_PROJ}.weight"].to(torch.float8_e4m3fn)
    add(base, {f"{Q_PROJ}.weight": scaled, f"{Q_PROJ}.weight_scale": torch.ones(())})


def round_to_integers(base: Path) -> None:
    add(base, {f"{Q_PROJ}.weight": torch.ones(32, 32, dtype=torch.int8)})


def widen(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "intermediate_size": 72}))


def cut_off(base: Path) -> None:
    (base / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes()[:5000])


def pickle(base: Path) -> None:
    torch.save(load_file(base / WEIGHTS), base / "pytorch_model.bin")
    (base / WEIGHTS).unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (leave_out_a_tensor, "its weight files do not have model.norm.weight"),
        (widen, "another shape than config.json says for model.layers.0.mlp.down_proj.weight and 5 more"),
        (add_a_bias, f"its weight files have {Q_PROJ}.bias, which the model of config.json does not use"),
        (add_scales, f"its weight files have {Q_PROJ}.input_scale and 1 more, which the model"),
        (bring_to_float8, f"{Q_PROJ}.weight is of the type F8_E4M3: this checkpoint is quantized already"),
        (round_to_integers, f"{Q_PROJ}.weight is of the type I8: this checkpoint is quantized already"),
        (cut_off, ""),
        (pickle, "pickles are not read"),
    ],
)
def test_damaged_weights_are_refused_alike_by_server_and_training(
    damage: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base")
    damage(base)
    with pytest.raises(StartupError) as served:
        load_base_model(config_of(base))
    assert served.value.reason == "MODEL_UNUSABLE"
    with pytest.raises(TrainingError) as trained:
        load_base(str(base))
    said = served.value.message.removeprefix(f"cannot load model {base}: ")
    assert reason in said
    assert trained.value.message == f"the base model base cannot be loaded: {said}"


def test_scales_of_fused_experts_are_refused(tmp_path: Path) -> None:
    """In the model these experts are no modules of their own."""
    make_tiny_model(CONFIGS["mixtral"]()).save_pretrained(tmp_path)
    scale = "model.layers.0.block_sparse_moe.experts.0.w1.weight_scale"
    add(tmp_path, {scale: torch.ones(())})
    with pytest.raises(StartupError, match=r"experts\.0\.w1\.weight_scale, which the model"):
        load_base_model(config_of(tmp_path))


def test_scales_of_a_base_without_a_head_are_refused(tmp_path: Path) -> None:
    """Its names lack the first part."""
    config = CONFIGS["gpt2"]()
    config.tie_word_embeddings = True
    make_tiny_model(config).transformer.save_pretrained(tmp_path)
    assert load_base_model(config_of(tmp_path)).modules.is_tied
    add(tmp_path, {"h.0.attn.c_attn.weight_scale": torch.ones(())})
    with pytest.raises(StartupError, match=r"have h\.0\.attn\.c_attn\.weight_scale, which the model"):
        load_base_model(config_of(tmp_path))


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("deepseek_v3", "model.layers.2.self_attn.q_a_proj.weight"),  # drafts tokens
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias"),
        ("gpt_oss", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("llama", "model.layers.0.self_attn.k_scale"),  # of a cache in fewer bits
        ("llama", "model.rotary_emb.cos_cached"),
        ("opt", "model.decoder.version"),
        ("qwen3_moe", "mtp.layers.0.input_layernorm.weight"),
    ],
)
def test_tensor_that_changes_nothing_is_left_alone(architecture: str, name: str, tmp_path: Path) -> None:
    """Files of published models have such."""
    make_tiny_model(CONFIGS[architecture]()).save_pretrained(tmp_path)
    add(tmp_path, {name: torch.ones(2)})
    assert load_base_model(config_of(tmp_path)).max_context_tokens == CONTEXT


def test_mask_that_is_no_number_is_left_alone(tmp_path: Path) -> None:
    make_tiny_model(CONFIGS["gpt2"]()).save_pretrained(tmp_path)
    add(tmp_path, {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8)})
    assert load_base_model(config_of(tmp_path)).max_context_tokens == CONTEXT


def test_four_bit_weights_of_another_shape_are_not_trained_on(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", hidden=64, inner=128)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "intermediate_size": 192}))
    with pytest.raises(TrainingError, match=r"another shape than config\.json says"):
        load_base(str(base), quantize="nf4")


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_base_named_by_a_hub_id_has_the_fingerprint_of_its_files(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So what was trained in float16, which has lost bits of them, is served."""
    model = tmp_path / "models--someone--tiny"
    base = write_base(model / "snapshots" / ("a" * 40))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("a" * 40)
    tensors = load_file(base / WEIGHTS)
    tensors["model.norm.weight"].fill_(1e-9)  # 0 in float16
    write_weights(base, tensors)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    served = load_base_model(EngineConfig(model="someone/tiny", model_name="tiny", num_threads=1))
    trained = load_base("someone/tiny", dtype)
    assert trained.name == "tiny"
    assert trained.modules.fingerprint == served.modules.fingerprint


def test_base_that_no_hub_provides_cannot_be_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TrainingError, match="cannot load model someone/tiny: there is no such directory"):
        load_base("someone/tiny")


def test_damaged_weights_end_a_command_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_base(tmp_path / "base")
    cut_off(base)
    data = write_texts(tmp_path / "data.jsonl", LETTERS)
    argv = ("train", "adapter", "--model", base, "--data", data, "--out", tmp_path / "out")
    assert main([str(argument) for argument in argv]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fusionserve: the base model base cannot be loaded: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_weight_of_codes_is_not_taken_for_the_bases(dtype: torch.dtype) -> None:
    base = base_of_codes(dtype)
    with pytest.raises(AssertionError, match="says nothing without its scales"):
        base.base_weight(Q_PROJ)


def base_of_codes(dtype: torch.dtype) -> BaseModel:
    base = adapt_model(make_tiny_model(CONFIGS["llama"]()), config_of(Path("unread")), Tokenizer(None))
    module = base._base_module(Q_PROJ)
    codes = nn.Linear(module.in_features, module.out_features, bias=False)  # type: ignore[call-overload]
    codes.weight = nn.Parameter(codes.weight.detach().to(dtype), requires_grad=False)
    base.model.get_submodule(Q_PROJ).base = codes
    return base


def add(base: Path, tensors: dict[str, Tensor]) -> None:
    write_weights(base, load_file(base / WEIGHTS) | tensors)


def write_weights(base: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
