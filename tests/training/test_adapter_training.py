"""Stage 1 writes an adapter that is learned, that the server's loader takes, and that names nothing of this machine."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_training import (
    DIGITS,
    LETTERS,
    adapter_run,
    ignoring_libraries,
    optimization,
    write_base,
    write_texts,
)
from transformers import GPT2Config, GPT2LMHeadModel

from fusionserve.errors import TrainingError
from fusionserve.training.adapter_reading import read_adapter
from fusionserve.training.adapter_training import train_adapter
from fusionserve.training.data import load_data
from fusionserve.training.evaluation import evaluate_loss
from fusionserve.training.frozen_base import load_base
from fusionserve.training.training_summary import PLOT_FILE, SUMMARY_FILE
from fusionserve.training_config import AdapterRun, DataConfig

pytestmark = ignoring_libraries


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write_base(folder / "base")
    write_texts(folder / "letters.jsonl", LETTERS)
    return folder


def run_in(root: Path, **changes: object) -> AdapterRun:
    return adapter_run(root, root / "letters.jsonl", **changes)


def test_the_adapter_is_learned_and_served(root: Path) -> None:
    summary = train_adapter(run_in(root, optimization=optimization(30)))
    assert summary.held_out_loss is not None
    assert summary.held_out_loss_before is not None
    assert summary.held_out_loss < 0.5 * summary.held_out_loss_before
    weights = read_adapter(root / "letters", load_base(str(root / "base")))
    assert len(weights.modules) == 14
    assert weights.max_rank == 4
    assert not (root / "letters.work").exists()


def test_what_is_written_is_readable_and_names_no_path(root: Path) -> None:
    train_adapter(run_in(root, out="told"))
    files = {path.name: path for path in (root / "told").iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", SUMMARY_FILE, PLOT_FILE}
    assert all(path.stat().st_mode & 0o044 for path in files.values())
    for name in ("adapter_config.json", SUMMARY_FILE):
        assert not re.search(r"[\"'=]/|\\\\|" + re.escape(str(root)), files[name].read_text())
    assert json.loads(files["adapter_config.json"].read_text())["base_model_name_or_path"] == "base"
    assert files[PLOT_FILE].read_bytes().startswith(b"\x89PNG")


def test_the_best_weights_are_written(root: Path) -> None:
    """A rate that ruins the weights late in the run leaves the earlier ones to be found."""
    config = optimization(12, learning_rate=0.5, eval_steps=2, schedule="constant", warmup_share=0.9)
    summary = train_adapter(run_in(root, out="best", optimization=config, keep_checkpoints=True))
    losses = {entry["step"]: entry["eval_loss"] for entry in summary.history if "eval_loss" in entry}
    del losses[0]
    assert summary.best_step == min(losses, key=lambda step: losses[step])
    assert summary.held_out_loss == pytest.approx(min(losses.values()), rel=1e-5)
    assert len(list((root / "best.work").glob("checkpoint-*"))) <= 2


def test_patience_ends_a_run_that_gets_no_better(root: Path) -> None:
    config = optimization(40, learning_rate=0.5, eval_steps=1, schedule="constant", patience=2)
    summary = train_adapter(run_in(root, out="patient", optimization=config))
    assert summary.steps < 40


def test_patience_without_held_out_examples_is_refused(root: Path) -> None:
    data = DataConfig(train=(root / "letters.jsonl",), held_out_share=0, max_tokens=32)
    run = replace(run_in(root, out="impatient", optimization=optimization(4, patience=3)), data=data)
    with pytest.raises(TrainingError, match="patience needs held-out examples"):
        train_adapter(run)
    assert not run.checkpoints.exists()


def test_accumulated_batches_train_as_one(root: Path) -> None:
    whole = train_adapter(run_in(root, out="whole", optimization=optimization(6, batch_rows=4)))
    parts = optimization(6, batch_rows=2, accumulation=2)
    assert train_adapter(run_in(root, out="parts", optimization=parts)).held_out_loss == pytest.approx(
        whole.held_out_loss, rel=1e-3
    )


@pytest.mark.parametrize(
    "changes",
    [{"use_rslora": True, "target_modules": ("q_proj",)}, {"optimization": optimization(4, bf16=True)}],
)
def test_options_give_adapters_that_are_served(changes: dict[str, object], root: Path) -> None:
    run = run_in(root, out="option", **{"optimization": optimization(4), **changes})
    train_adapter(run)
    weights = read_adapter(root / "option", load_base(str(root / "base")))
    assert len(weights.modules) == (2 if run.target_modules else 14)


def test_a_run_without_held_out_rows_writes_its_last_weights(root: Path) -> None:
    run = run_in(root, out="last")
    summary = train_adapter(replace(run, data=replace(run.data, held_out_share=0, packing=False)))
    assert (summary.held_out_loss, summary.best_step, summary.data["held_out_rows"]) == (None, None, 0)
    assert summary.data["train_rows"] == 24
    assert "held out" not in summary.to_table()
    assert json.loads((root / "last" / SUMMARY_FILE).read_text())["held_out_perplexity"] is None


def test_conv1d_models_train(tmp_path: Path) -> None:
    write_base(tmp_path / "base")  # for its tokenizer
    config = GPT2Config(
        vocab_size=272, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    data = write_texts(tmp_path / "letters.jsonl", LETTERS)
    train_adapter(adapter_run(tmp_path, data, optimization=optimization(3)))
    weights = read_adapter(tmp_path / "letters", load_base(str(tmp_path / "base")))
    assert weights.target_modules == ("c_attn", "c_fc", "c_proj")


def test_unknown_modules_are_refused_by_name(root: Path) -> None:
    with pytest.raises(TrainingError, match=r"no module 'qproj' to adapt; it has down_proj, .*v_proj"):
        train_adapter(run_in(root, out="x", target_modules=("qproj",)))
    assert not (root / "x").exists()


def test_a_folder_of_something_else_is_not_replaced(root: Path) -> None:
    (root / "mine").mkdir()
    (root / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(TrainingError, match="neither free nor an adapter"):
        train_adapter(run_in(root, out="mine"))
    assert (root / "mine" / "thesis.txt").read_text() == "years of work"


def test_checkpoints_do_not_lie_in_what_is_replaced(root: Path) -> None:
    with pytest.raises(TrainingError, match="the checkpoints would lie in"):
        train_adapter(run_in(root, out="nested", work_dir=root / "nested" / "work"))
    assert not (root / "nested").exists()


def test_a_lost_loss_ends_the_run_without_an_artifact(root: Path) -> None:
    config = optimization(10, learning_rate=1e30, max_grad_norm=0, warmup_share=0, eval_steps=5)
    with pytest.raises(TrainingError, match="lower the learning rate"):
        train_adapter(run_in(root, out="lost", optimization=config))
    assert not (root / "lost").exists()


def test_gradients_over_nf4_weights_are_right_after_an_evaluation(tmp_path: Path) -> None:
    """bitsandbytes repacks 4-bit weights at an evaluation on some processors; gradients then stop silently."""
    write_base(tmp_path / "base", hidden=64, inner=128)
    base = load_base(str(tmp_path / "base"), quantize="nf4")
    plain = load_base(str(tmp_path / "base"))
    with torch.no_grad():
        for path, module in plain.modules.by_path.items():
            if ".layers." in path:
                weight = plain.model.get_submodule(path).weight
                weight.copy_(base.model.get_submodule(path)(torch.eye(module.d_in)).T)
    found, expected = (lora_gradient(which.model) for which in (base, plain))
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.99
    assert float(found.norm() / expected.norm()) == pytest.approx(1, abs=0.05)


def lora_gradient(model: torch.nn.Module) -> torch.Tensor:
    """Of the first layer's q_proj, which every later layer stands between the loss and."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0], init_lora_weights=False)
    adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    token_ids = torch.arange(24).reshape(2, 12)
    adapted.eval()
    with torch.no_grad():
        adapted(input_ids=token_ids)
    adapted.train()
    adapted(input_ids=token_ids, labels=token_ids).loss.backward()
    gradients = [p.grad.flatten() for p in adapted.parameters() if p.requires_grad and p.grad is not None]
    return torch.cat(gradients)


def test_qlora_adapters_serve_on_either_base(tmp_path: Path) -> None:
    """Trained over NF4 weights; it helps there and on the base as it is."""
    base = load_base(str(write_base(tmp_path / "base", hidden=64, inner=128)))
    data = write_texts(tmp_path / "letters.jsonl", LETTERS, DIGITS)
    run = adapter_run(tmp_path, data, quantize="nf4", optimization=optimization(20))
    summary = train_adapter(run)
    assert summary.held_out_loss_before is not None
    assert summary.held_out_loss is not None
    assert summary.held_out_loss < 0.7 * summary.held_out_loss_before
    full = train_adapter(replace(run, quantize="none", out=tmp_path / "full"))
    assert summary.base_bytes < full.base_bytes
    assert summary.total_parameters == full.total_parameters
    held_out = load_data(run.data, base.tokenizer, 0).held_out
    before = evaluate_loss(base.model, held_out, 8).loss
    adapted = PeftModel.from_pretrained(base.model, tmp_path / "letters")
    assert evaluate_loss(adapted, held_out, 8).loss < 0.7 * before
