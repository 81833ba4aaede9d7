"""Stage 1, knowledge extraction: a LoRA adapter on a frozen base, on PEFT; over NF4 base weights this is QLoRA."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import save_file
from transformers import set_seed

from fusionserve.adapters.base_modules import ModuleKind
from fusionserve.adapters.lora_loader import WEIGHTS_FILE
from fusionserve.training.adaptation_trainer import run_training
from fusionserve.training.adapter_reading import read_adapter
from fusionserve.training.data import TrainingData, load_data
from fusionserve.training.frozen_base import FrozenBase, load_base
from fusionserve.training.run_frame import RunFrame
from fusionserve.training.target_modules import choose_targets
from fusionserve.training.training_summary import TrainingSummary, write_summary
from fusionserve.training_config import AdapterRun


def train_adapter(
    run: AdapterRun, *, base: FrozenBase | None = None, data: TrainingData | None = None
) -> TrainingSummary:
    """Trains an adapter and writes it to `run.out`, a directory as PEFT writes it, with the summary beside it.

    `base` and `data` may be given to share them between runs. Raises TrainingError, and ArtifactError if the server
    would refuse the adapter.
    """
    set_seed(run.optimization.seed)
    base = base or load_base(run.model, run.dtype, run.quantize)
    data = data or load_data(run.data, base.tokenizer, run.optimization.seed)
    frame = RunFrame(run, base, data)
    model = _add_lora(base, run)
    try:
        _check_servable(model, base)
        trained = run_training(model, data, run, frame.checkpoint)
        summary = frame.summarize("adapter", run.out.name, model, trained, frame.judge(model))
        with frame.writing() as staging:
            _save(model, base, staging)
            read_adapter(staging, base)
            write_summary(staging, summary)
    finally:
        model.unload()
    frame.close()
    return summary


def _add_lora(base: FrozenBase, run: AdapterRun) -> PeftModel:
    config = LoraConfig(
        r=run.rank,
        lora_alpha=2 * run.rank if run.alpha is None else run.alpha,  # type: ignore[arg-type]
        lora_dropout=run.dropout,
        target_modules=list(choose_targets(base, run.target_modules)),
        use_rslora=run.use_rslora,
        fan_in_fan_out=any(module.kind is ModuleKind.CONV1D for module in base.modules.by_path.values()),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(base.model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def _check_servable(model: PeftModel, base: FrozenBase) -> None:
    """Lets the server's loader read the untrained adapter, so that a refusal comes before the work."""
    with tempfile.TemporaryDirectory() as directory:
        _save(model, base, Path(directory))
        read_adapter(Path(directory), base)


def _save(model: PeftModel, base: FrozenBase, directory: Path) -> None:
    """Configuration and weights as PEFT writes them, naming the base and no path."""
    config = copy.copy(model.peft_config["default"])
    assert isinstance(config, LoraConfig)
    config.base_model_name_or_path = base.name
    config.target_modules = sorted(
        config.target_modules or ()
    )  # PEFT made it a set, which has no fixed order
    config.inference_mode = True
    config.save_pretrained(str(directory))
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    contiguous = {name: tensor.to(torch.float32).contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, directory / WEIGHTS_FILE, metadata={"format": "pt"})
