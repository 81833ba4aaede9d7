"""Every served feature against PEFT: the same delta per module, from PEFT's own files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from lora_files import CONFIG_FILE, load_directory
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft_adapters import (
    adapt,
    layer_delta,
    lora_layers,
    make_tiny_gpt2,
    make_tiny_llama,
    quiet_peft,
    randomize,
    reload,
    save,
    wrap,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from fusionserve.adapters.base_modules import ModuleKind, describe_base_modules
from fusionserve.adapters.lora_weights import LoRAWeights, ModuleLoRA
from fusionserve.errors import ArtifactError

TOLERANCE = 1e-5


def our_delta(module: ModuleLoRA, x: Tensor) -> Tensor:
    """expand^T (shrink x + shrink_bias), x as vectors or as token ids."""
    u = module.shrink.T[x] if x.dtype == torch.long else x @ module.shrink.T
    return (u if module.shrink_bias is None else u + module.shrink_bias) @ module.expand


def make_input(kind: ModuleKind, d_in: int) -> Tensor:
    if kind is ModuleKind.EMBEDDING:
        return torch.arange(d_in)
    return torch.randn(5, d_in, generator=torch.Generator().manual_seed(2))


def assert_equals_peft(model: PreTrainedModel, directory: Path, **options: object) -> LoRAWeights:
    """Adapts and saves with PEFT, then compares the delta of each module, loaded with ours and with PEFT."""
    save(adapt(model, **options), directory)
    return assert_loads_like_peft(model, directory)


def assert_loads_like_peft(model: PreTrainedModel, directory: Path) -> LoRAWeights:
    base = describe_base_modules(model)
    weights = load_directory(directory, base, model=model)
    layers = lora_layers(reload(model, directory))
    assert weights.modules.keys() == layers.keys()
    for path, layer in layers.items():
        x = make_input(base.by_path[path].kind, base.by_path[path].d_in)
        torch.testing.assert_close(
            our_delta(weights.modules[path], x), layer_delta(layer, x), atol=TOLERANCE, rtol=TOLERANCE
        )
    return weights


SERVED = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "all_linear": {"target_modules": "all-linear", "lora_alpha": 7},
    "regex_targets": {"target_modules": r".*\.(q|v)_proj"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
    "layers_to_transform": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 5},
    "rank_pattern": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}},
    "alpha_pattern": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"model.layers.0.self_attn.v_proj": 3},
        "alpha_pattern": {"v_proj": 10},
    },
    "regex_patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {r"layers\.0\..*_proj": 2, r"layers\.[01]\.mlp\.(up|down)_proj": 3},
        "alpha_pattern": {r"^model.layers.1.self_attn.(q|k)_proj": 3, r".*\.mlp\..*": 5},
    },
    "first_match_wins": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 5, "self_attn.q_proj": 3},
        "alpha_pattern": {".*_proj": 6, "q_proj": 60},
    },
    "patterns_with_rslora": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 9},
        "use_rslora": True,
    },
    "keys_that_match_nothing": {"target_modules": ["q_proj"], "rank_pattern": {"proj": 2, "q_proj.x": 3}},
    "lora_bias": {"target_modules": ["q_proj", "down_proj"], "lora_bias": True},
    "lm_head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding_and_lm_head": {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.5},
}


@pytest.mark.parametrize("options", SERVED.values(), ids=SERVED)
def test_delta_equals_peft(options: dict[str, object], tmp_path: Path) -> None:
    weights = assert_equals_peft(make_tiny_llama(), tmp_path, **options)
    assert weights.is_low_rank_only
    assert weights.max_rank > 0
    assert len(weights.digest) == 64


@pytest.mark.parametrize("keys", [("q_proj", ".*_proj"), (".*_proj", "q_proj")])
def test_first_key_in_the_file_wins(keys: tuple[str, str], tmp_path: Path) -> None:
    """PEFT sorts keys when it saves and goes by the file's order when it loads, so the file's order counts."""
    model = make_tiny_llama()
    save(adapt(model, target_modules=["q_proj", "v_proj"]), tmp_path)
    file = tmp_path / CONFIG_FILE
    config = json.loads(file.read_text())
    config["alpha_pattern"] = dict(zip(keys, (60, 6), strict=True))
    file.write_text(json.dumps(config))
    assert_loads_like_peft(model, tmp_path)


def test_delta_of_tied_model_equals_peft(tmp_path: Path) -> None:
    assert_equals_peft(make_tiny_llama(tie=True), tmp_path, target_modules=["embed_tokens", "q_proj"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_pattern": {"embed_tokens": 3}},
        {"rank_pattern": {"lm_head": 3}, "use_rslora": True},
        {"rank_pattern": {"embed_tokens": 3}, "alpha_pattern": {"lm_head": 30}},
    ],
    ids=str,
)
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_delta_of_tied_adapters_equals_peft(target: str, options: dict[str, object], tmp_path: Path) -> None:
    model = make_tiny_llama(tie=True)
    options = {"target_modules": [target], "ensure_weight_tying": True, "lora_alpha": 16, **options}
    weights = assert_equals_peft(model, tmp_path, **options)
    assert weights.modules.keys() == {"model.embed_tokens", "lm_head"}


@pytest.mark.parametrize("missing", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize(
    "options", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}], ids=str
)
def test_half_of_a_tied_pair_is_refused(
    options: Mapping[str, list[str]], missing: str, tmp_path: Path
) -> None:
    """PEFT changes both of a pair, or none, so a file with one of them was not written by it."""
    model = make_tiny_llama(tie=True)
    save(adapt(model, **{"target_modules": ["q_proj"], **options}, ensure_weight_tying=True), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if missing not in name}, file)
    with pytest.raises(ArtifactError) as refusal:
        load_directory(tmp_path, describe_base_modules(model), model=model)
    assert refusal.value.reason == "TENSOR_MISSING"


def test_delta_of_conv1d_equals_peft(tmp_path: Path) -> None:
    options = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    weights = assert_equals_peft(make_tiny_gpt2(), tmp_path, rank_pattern={r"h\.1\.mlp\.c_fc": 6}, **options)
    assert weights.modules["transformer.h.0.attn.c_attn"].expand.shape == (4, 48)


def test_delta_of_gpt2_embedding_equals_peft(tmp_path: Path) -> None:
    assert_equals_peft(make_tiny_gpt2(), tmp_path, target_modules=["wte"])


def test_lora_bias_is_one_more_rank_row(tmp_path: Path) -> None:
    weights = assert_equals_peft(make_tiny_llama(), tmp_path, target_modules=["q_proj"], lora_bias=True)
    module = weights.modules["model.layers.0.self_attn.q_proj"]
    assert module.shrink_bias is not None
    assert (module.rank, weights.max_rank) == (5, 5)
    assert module.shrink_bias.tolist() == [0, 0, 0, 0, 1]
    assert module.shrink[-1].count_nonzero() == 0


@pytest.mark.parametrize(
    ("make", "targets"), [(make_tiny_llama, ["q_proj", "lm_head"]), (make_tiny_gpt2, ["c_attn"])]
)
def test_dora_equals_peft(make: Callable[[], PreTrainedModel], targets: list[str], tmp_path: Path) -> None:
    """y = c (W0 x + delta) + b0 with c = m / |W0 + s B A| gives what PEFT's layer gives."""
    model = make()
    is_conv1d = targets == ["c_attn"]
    peft_model = adapt(model, target_modules=targets, use_dora=True, fan_in_fan_out=is_conv1d)
    base = describe_base_modules(model)
    weights = load_directory(save(peft_model, tmp_path), base, model=model)
    assert not weights.is_low_rank_only
    assert weights.has_magnitudes
    for path, layer in lora_layers(peft_model).items():
        module = weights.modules[path]
        assert module.magnitude is not None
        torch.testing.assert_close(module.magnitude, layer.lora_magnitude_vector["default"].weight.detach())
        weight = layer.base_layer.weight.detach()
        weight = weight.T if is_conv1d else weight
        c = module.magnitude / (weight + module.expand.T @ module.shrink).norm(dim=1)
        x = make_input(base.by_path[path].kind, base.by_path[path].d_in)
        bias = 0 if layer.base_layer.bias is None else layer.base_layer.bias.detach()
        ours = c * (x @ weight.T + our_delta(module, x)) + bias
        torch.testing.assert_close(ours, layer(x).detach(), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("tie", [False, True])
def test_modules_to_save_replace_head_and_embedding(tie: bool, tmp_path: Path) -> None:
    model = make_tiny_llama(tie=tie)
    peft_model = adapt(model, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    weights = load_directory(save(peft_model, tmp_path), describe_base_modules(model))
    inner = peft_model.base_model.model
    assert weights.replacements.keys() == {"lm_head", "model.embed_tokens"}
    assert not weights.is_low_rank_only
    assert torch.equal(weights.replacements["lm_head"], inner.lm_head.modules_to_save["default"].weight)
    saved_embedding = inner.model.embed_tokens.modules_to_save["default"].weight
    assert torch.equal(weights.replacements["model.embed_tokens"], saved_embedding)
    assert weights.target_modules == ("embed_tokens", "lm_head", "q_proj")


def test_tied_modules_to_save_replace_both(tmp_path: Path) -> None:
    """PEFT saves embedding and head though modules_to_save names one."""
    model = make_tiny_llama(tie=True)
    peft_model = adapt(
        model, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    weights = load_directory(save(peft_model, tmp_path), describe_base_modules(model))
    assert torch.equal(weights.replacements["lm_head"], weights.replacements["model.embed_tokens"])


def save_twice(model: PreTrainedModel, directory: Path, names: list[str]) -> PeftModel:
    """`save_embedding_layers` has PEFT write a trained module twice, and the base's own weight beside it."""
    peft_model = adapt(model, target_modules=["q_proj"], modules_to_save=names)
    save(peft_model, directory, save_embedding_layers=True)
    return peft_model


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids=str)
def test_modules_that_are_saved_twice_are_served(names: list[str], tie: bool, tmp_path: Path) -> None:
    model = make_tiny_llama(tie=tie)
    saved = save_twice(model, tmp_path, names).base_model.model
    base = describe_base_modules(model)
    weights = load_directory(tmp_path, base, dtype=torch.bfloat16, model=model)
    assert {path.rpartition(".")[2] for path in weights.replacements} == set(names)
    for path, replacement in weights.replacements.items():
        trained = saved.get_submodule(path).modules_to_save["default"].weight
        assert torch.equal(replacement, trained.bfloat16())


@pytest.mark.parametrize(
    ("suffix", "reason", "problem"),
    [
        ("modules_to_save.weight", "UNEXPECTED_TENSOR", "differs from the other replacement of its module"),
        ("original_module.weight", "ADAPTER_UNSUPPORTED", "changed copy of the base"),
    ],
)
def test_module_that_is_saved_in_two_versions_is_refused(
    suffix: str, reason: str, problem: str, tmp_path: Path
) -> None:
    model = make_tiny_llama()
    save_twice(model, tmp_path, ["lm_head"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.lm_head.{suffix}"][7, 3] += 0.01
    save_file(tensors, file)
    with pytest.raises(ArtifactError, match=problem) as refusal:
        load_directory(tmp_path, describe_base_modules(model), model=model)
    assert refusal.value.reason == reason


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_converted_checkpoint_equals_peft(init: str, use_rslora: bool, tmp_path: Path) -> None:
    """Base as it was plus our delta = PEFT's changed base plus its adapter."""
    model = make_tiny_llama()
    options = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": init, "use_rslora": use_rslora}
    peft_model = wrap(model, **options)
    config = peft_model.peft_config["default"]
    config.init_lora_weights = True
    save(peft_model, tmp_path / "start")
    config.init_lora_weights = init
    randomize(peft_model)
    converted = save(
        peft_model, tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    base = describe_base_modules(model)
    weights = load_directory(converted, base)
    for path, layer in lora_layers(peft_model).items():
        x = make_input(ModuleKind.LINEAR, base.by_path[path].d_in)
        ours = model.get_submodule(path)(x) + our_delta(weights.modules[path], x)
        torch.testing.assert_close(ours.detach(), layer(x).detach(), atol=TOLERANCE, rtol=TOLERANCE)
        assert weights.modules[path].rank == 8


# Options of LoraConfig that PEFT itself can save and that this server refuses.
REFUSED = {
    "pissa": ({"init_lora_weights": "pissa"}, "pissa"),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_2"}, "pissa_niter_2"),
    "olora": ({"init_lora_weights": "olora"}, "olora"),
    "bias_all": ({"bias": "all"}, "bias 'all'"),
    "bias_lora_only": ({"bias": "lora_only"}, "bias 'lora_only'"),
    "trainable_tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "kasa": ({"kasa_config": {}}, "kasa_config"),
    "velora": ({"velora_config": {"num_groups": 4}}, "velora_config"),
    "monteclora": ({"monteclora_config": {"num_samples": 2}}, "monteclora_config"),
    "bdlora": ({"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}}, "use_bdlora"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "norm_to_save": ({"modules_to_save": ["norm"]}, "modules_to_save 'norm'"),
    "embedding_dora": ({"target_modules": ["embed_tokens"], "use_dora": True}, "DoRA on the input embedding"),
}


@pytest.mark.parametrize(("options", "named"), REFUSED.values(), ids=REFUSED)
def test_option_is_refused_by_name(options: dict[str, object], named: str, tmp_path: Path) -> None:
    model = make_tiny_llama(bias=True)
    save(adapt(model, **{"target_modules": ["q_proj"], **options}), tmp_path)
    with pytest.raises(ArtifactError, match=named) as refusal:
        load_directory(tmp_path, describe_base_modules(model), model=model)
    assert refusal.value.reason == "ADAPTER_UNSUPPORTED"


OTHER_METHODS = {
    "IA3": IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "LOHA": LoHaConfig(target_modules=["q_proj"]),
    "LOKR": LoKrConfig(target_modules=["q_proj"]),
    "ADALORA": AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "VERA": VeraConfig(target_modules=["q_proj"]),
    "OFT": OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    "PROMPT_TUNING": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize(("name", "config"), OTHER_METHODS.items(), ids=OTHER_METHODS)
def test_other_method_is_refused_by_name(name: str, config: PeftConfig, tmp_path: Path) -> None:
    model = make_tiny_llama()
    with quiet_peft():
        save(get_peft_model(make_tiny_llama(), config), tmp_path)
    with pytest.raises(ArtifactError, match=name) as refusal:
        load_directory(tmp_path, describe_base_modules(model))
    assert refusal.value.reason == "ADAPTER_UNSUPPORTED"


def test_resized_vocabulary_is_refused(tmp_path: Path) -> None:
    model = make_tiny_llama()
    larger = make_tiny_llama()
    larger.resize_token_embeddings(44, mean_resizing=False)
    save(adapt(larger, target_modules=["q_proj"]), tmp_path, save_embedding_layers=True)
    with pytest.raises(ArtifactError, match="resized vocabulary of 44 tokens") as refusal:
        load_directory(tmp_path, describe_base_modules(model), model=model)
    assert refusal.value.reason == "ADAPTER_UNSUPPORTED"


@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_copy_of_changed_embedding_is_refused(target: str, tmp_path: Path) -> None:
    model = make_tiny_llama()
    changed = make_tiny_llama()
    with torch.no_grad():
        changed.get_input_embeddings().weight[7, 3] += 0.01
    save(adapt(changed, target_modules=[target]), tmp_path, save_embedding_layers=True)
    with pytest.raises(ArtifactError, match="changed copy of the base") as refusal:
        load_directory(tmp_path, describe_base_modules(model), model=model)
    assert refusal.value.reason == "ADAPTER_UNSUPPORTED"
    assert load_directory(tmp_path, describe_base_modules(changed), model=changed).replacements == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copy_of_rounded_base_is_accepted(dtype: torch.dtype, tmp_path: Path) -> None:
    """The base is served in half precision, the adapter was trained on it in float32."""
    model = make_tiny_llama()
    save(adapt(model, target_modules=["embed_tokens"]), tmp_path)
    base = describe_base_modules(model)
    weights = load_directory(tmp_path, base, dtype=dtype, model=make_tiny_llama().to(dtype))
    assert weights.modules["model.embed_tokens"].shrink.dtype == dtype
