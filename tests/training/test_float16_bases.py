"""A base whose checkpoint is in float16: trained over in bfloat16, and inspected in either."""

from pathlib import Path

import pytest
import torch
from tiny_training import (
    DIGITS,
    LETTERS,
    adapter_run,
    fusion_run,
    ignoring_libraries,
    optimization,
    write_base,
    write_member,
    write_texts,
)
from transformers import LlamaForCausalLM

from fusionserve.errors import TrainingError
from fusionserve.inspection_request import InspectionRequest
from fusionserve.training.adapter_training import train_adapter
from fusionserve.training.frozen_base import load_base
from fusionserve.training.fusion_inspection import inspect_fusion
from fusionserve.training.fusion_training import train_fusion

pytestmark = ignoring_libraries


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write_base(folder / "base")
    LlamaForCausalLM.from_pretrained(folder / "base").half().save_pretrained(folder / "base")
    write_texts(folder / "both.jsonl", LETTERS, DIGITS)
    write_member(folder / "m1", 1)
    return folder


def test_auto_is_bfloat16(root: Path) -> None:
    base, as_it_is = (load_base(str(root / "base"), dtype) for dtype in ("auto", "float16"))
    assert base.model.dtype == torch.bfloat16
    assert as_it_is.model.dtype == torch.float16
    assert base.modules.fingerprint == as_it_is.modules.fingerprint


def test_both_stages_train_on_it_and_the_fusion_is_inspected(root: Path) -> None:
    data = root / "both.jsonl"
    train_adapter(adapter_run(root, data, optimization=optimization(2)))
    train_fusion(fusion_run(root, data, {"m1": root / "m1"}, optimization=optimization(2)))
    for dtype in ("auto", "float16"):
        request = InspectionRequest(
            fusion=root / "mix",
            prompts=("abc cab",),
            members=(("m1", root / "m1"),),
            model=str(root / "base"),
            dtype=dtype,
        )
        assert inspect_fusion(request).members == ("m1",)


def test_nothing_is_trained_in_float16(root: Path) -> None:
    """Without loss scaling the gradients of a mean over thousands of tokens would be zeros."""
    run = adapter_run(root, root / "both.jsonl", "none", dtype="float16")
    with pytest.raises(TrainingError, match=r"is in float16, .* train with --dtype bfloat16 or float32"):
        train_adapter(run)
    with pytest.raises(TrainingError, match="is in float16"):
        train_fusion(
            fusion_run(root, root / "both.jsonl", {"m1": root / "m1"}, out=root / "none"),
            base=load_base(str(root / "base"), "float16"),
        )
    assert not (root / "none").exists()
