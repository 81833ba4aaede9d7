"""An LM head's bias in an adapter's file: a copy of the base's, or with a saved head the bias that is served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lora_files import LM_HEAD, PREFIX, load_directory
from peft_adapters import adapt, make_tiny_llama, save
from safetensors.torch import load_file, save_file
from served_adapters import make_model
from torch import Tensor
from transformers import PreTrainedModel

from fusionserve.adapters.base_modules import describe_base_modules
from fusionserve.adapters.lora_loader import WEIGHTS_FILE
from fusionserve.adapters.lora_weights import LoRAWeights
from fusionserve.errors import ArtifactError

COPY, SAVED = f"{PREFIX}lm_head.base_layer.bias", f"{PREFIX}lm_head.bias"


@pytest.fixture(scope="module")
def phi() -> PreTrainedModel:
    return make_model("phi")


def load(directory: Path, model: PreTrainedModel) -> LoRAWeights:
    return load_directory(directory, describe_base_modules(model), model=model)


def refusal(directory: Path, model: PreTrainedModel) -> ArtifactError:
    with pytest.raises(ArtifactError) as caught:
        load(directory, model)
    return caught.value


def change(directory: Path, name: str, changed: Callable[[Tensor], Tensor]) -> None:
    """Of one tensor of an adapter's file."""
    file = directory / WEIGHTS_FILE
    tensors = load_file(file)
    save_file({**tensors, name: changed(tensors[name]).contiguous()}, file)


def test_copy_of_the_bias_is_accepted(phi: PreTrainedModel, tmp_path: Path) -> None:
    save(adapt(phi, target_modules=["lm_head"]), tmp_path)
    assert COPY in load_file(tmp_path / WEIGHTS_FILE)
    weights = load(tmp_path, phi)
    assert weights.modules.keys() == {LM_HEAD} and weights.is_low_rank_only


def test_changed_copy_of_the_bias_is_refused(phi: PreTrainedModel, tmp_path: Path) -> None:
    save(adapt(phi, target_modules=["lm_head"]), tmp_path)
    change(tmp_path, COPY, lambda bias: bias + 0.01)
    error = refusal(tmp_path, phi)
    assert error.reason == "ADAPTER_UNSUPPORTED" and "lm_head.base_layer.bias" in error.message


def test_bias_that_was_not_to_be_saved_is_a_copy(phi: PreTrainedModel, tmp_path: Path) -> None:
    save(adapt(phi, target_modules=["q_proj"]), tmp_path, save_embedding_layers=True)
    assert SAVED in load_file(tmp_path / WEIGHTS_FILE)
    assert not load(tmp_path, phi).replaced_biases
    change(tmp_path, SAVED, lambda bias: bias + 0.01)
    assert refusal(tmp_path, phi).reason == "ADAPTER_UNSUPPORTED"


def test_saved_head_has_its_own_bias(phi: PreTrainedModel, tmp_path: Path) -> None:
    peft_model = adapt(phi, target_modules=["q_proj"], modules_to_save=["lm_head"])
    weights = load(save(peft_model, tmp_path), phi)
    saved = peft_model.base_model.model.lm_head.modules_to_save["default"]
    assert torch.equal(weights.replacements[LM_HEAD], saved.weight)
    assert torch.equal(weights.replaced_biases[LM_HEAD], saved.bias)
    assert not torch.equal(saved.bias, phi.lm_head.bias)
    assert weights.nbytes > saved.weight.nbytes + saved.bias.nbytes


def test_bias_of_another_shape_is_refused(phi: PreTrainedModel, tmp_path: Path) -> None:
    save(adapt(phi, target_modules=["lm_head"]), tmp_path)
    change(tmp_path, COPY, lambda bias: bias[:-1])
    assert refusal(tmp_path, phi).reason == "SHAPE_MISMATCH"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [(SAVED, "UNEXPECTED_TENSOR"), (f"{PREFIX}lm_head.original_module.bias", "ADAPTER_UNSUPPORTED")],
)
def test_bias_that_is_saved_twice_is_served_if_nothing_differs(
    phi: PreTrainedModel, changed: str, reason: str, tmp_path: Path
) -> None:
    """As `save_embedding_layers` has it, with the base's own bias beside them."""
    peft_model = adapt(phi, target_modules=["q_proj"], modules_to_save=["lm_head"])
    weights = load(save(peft_model, tmp_path, save_embedding_layers=True), phi)
    saved = peft_model.base_model.model.lm_head.modules_to_save["default"]
    assert torch.equal(weights.replaced_biases[LM_HEAD], saved.bias)
    change(tmp_path, changed, lambda bias: bias + 0.01)
    assert refusal(tmp_path, phi).reason == reason


@pytest.mark.parametrize("name", [COPY, f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.bias"])
def test_bias_that_the_base_does_not_have_is_refused(name: str, tmp_path: Path) -> None:
    model = make_tiny_llama()
    save(adapt(model, target_modules=["lm_head", "q_proj"]), tmp_path)
    file = tmp_path / WEIGHTS_FILE
    save_file({**load_file(file), name: torch.zeros(40)}, file)
    assert refusal(tmp_path, model).reason == "UNEXPECTED_TENSOR"
