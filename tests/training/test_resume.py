"""A run that is killed goes on from its last complete checkpoint and comes to what it would have come to."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lora_files import make_config
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
from torch import Tensor

from fusionserve.errors import TrainingError
from fusionserve.training import checkpoints
from fusionserve.training.adaptation_trainer import AdaptationTrainer
from fusionserve.training.adapter_training import train_adapter
from fusionserve.training.checkpoints import mark_complete, prepare_work_dir, remove_work_dir
from fusionserve.training.fusion_training import train_fusion
from fusionserve.training.training_summary import TrainingSummary
from fusionserve.training_config import DataConfig

pytestmark = ignoring_libraries

FUSIONSERVE = Path(sys.executable).with_name("fusionserve")
NUM_STEPS, INTERVAL = 24, 4
SCORE_DROPOUT = 0.2  # so that the state of the random numbers counts
SETTINGS = {
    "steps": NUM_STEPS,
    "batch-rows": 4,
    "max-tokens": 32,
    "d-key": 8,
    "learning-rate": 0.02,
    "eval-steps": INTERVAL,
    "score-dropout": SCORE_DROPOUT,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write_base(folder / "base")
    write_texts(folder / "both.jsonl", LETTERS, DIGITS)
    for seed in (1, 2):
        write_member(folder / f"m{seed}", seed)
    return folder


def start(root: Path, out: str, *flags: str) -> subprocess.Popen[bytes]:
    """`fusionserve train fusion` in a process of its own."""
    flags = (*flags, *(f"--{name}={value}" for name, value in SETTINGS.items()))
    paths = ("--model", root / "base", "--data", root / "both.jsonl", "--out", root / out)
    members = ("--member", f"m1={root / 'm1'}", "--member", f"m2={root / 'm2'}")
    command = [
        str(part) for part in (FUSIONSERVE, "train", "fusion", *paths, *members, "--name", "mix", *flags)
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def complete_steps(work_dir: Path) -> list[int]:
    return [int(marker.parent.name.split("-")[1]) for marker in work_dir.glob("checkpoint-*/complete.json")]


def steps_from_here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are trained from here on, by their number."""
    steps, train = list[int](), AdaptationTrainer.training_step

    def note(trainer: AdaptationTrainer, *arguments: Any, **options: Any) -> Tensor:
        steps.append(trainer.state.global_step)
        return train(trainer, *arguments, **options)

    monkeypatch.setattr(AdaptationTrainer, "training_step", note)
    return steps


def losses_of(summary: TrainingSummary) -> list[float]:
    return [entry["loss"] for entry in summary.history if "loss" in entry]


def replace_weights(member: Path) -> None:
    write_member(member, 77)


def change_scaling(member: Path) -> None:
    """The weights stay."""
    (member / "adapter_config.json").write_text(json.dumps(make_config(lora_alpha=5)))


@pytest.mark.parametrize("change", [replace_weights, change_scaling])
def test_a_run_does_not_go_on_with_other_members(
    root: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    members = {name: write_member(tmp_path / name, seed) for seed, name in enumerate(("a", "b"))}
    run = fusion_run(root, root / "both.jsonl", members, keep_checkpoints=True, out=tmp_path / "mix")
    train_fusion(run)
    change(tmp_path / "b")
    with pytest.raises(TrainingError, match="other settings, data or members"):
        train_fusion(replace(run, out=tmp_path / "mix", resume=True))


def test_a_killed_run_resumes_to_the_same_loss(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(root, "killed")
    deadline_s = time.monotonic() + 60
    while not (root / "killed.work" / "checkpoint-8" / "complete.json").exists():
        assert process.poll() is None, process.stdout.read().decode()  # type: ignore[union-attr]
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()  # type: ignore[union-attr]
    assert not (root / "killed").exists()
    newest = max(complete_steps(root / "killed.work"))
    assert newest < NUM_STEPS

    run = fusion_run(
        root,
        root / "both.jsonl",
        {"m1": root / "m1", "m2": root / "m2"},
        score_dropout=SCORE_DROPOUT,
        optimization=optimization(NUM_STEPS, eval_steps=INTERVAL),
    )
    whole = train_fusion(replace(run, out=root / "whole"))
    steps = steps_from_here(monkeypatch)
    found = train_fusion(replace(run, out=root / "killed", resume=True))
    assert steps == list(range(newest, NUM_STEPS))
    assert found.steps == whole.steps == NUM_STEPS
    assert found.held_out_loss == pytest.approx(whole.held_out_loss, rel=1e-4)
    assert losses_of(found) == pytest.approx(losses_of(whole), rel=1e-3)


def test_a_run_killed_behind_its_last_step_only_writes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = adapter_run(root, root / "both.jsonl", keep_checkpoints=True)
    whole = train_adapter(run)
    steps = steps_from_here(monkeypatch)
    resumed = train_adapter(replace(run, resume=True))
    assert not steps
    assert resumed.steps == whole.steps
    assert resumed.held_out_loss == whole.held_out_loss
    assert resumed.seconds >= whole.seconds - 0.2
    remove_work_dir(run.checkpoints)


@pytest.mark.parametrize("is_moved", [False, True])
def test_a_run_that_ended_early_goes_no_further(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_moved: bool
) -> None:
    """Its patience was out at the last checkpoint; what was best lies in the folder, wherever that is by now."""
    quick = optimization(40, learning_rate=0.3, eval_steps=2, patience=1)
    run = adapter_run(
        root, root / "both.jsonl", keep_checkpoints=True, optimization=quick, out=tmp_path / "a"
    )
    whole = train_adapter(run)
    assert whole.best_step < whole.steps < 40
    if is_moved:
        run.checkpoints.rename(tmp_path / "b.work")
        run = replace(run, out=tmp_path / "b")
    steps = steps_from_here(monkeypatch)
    resumed = train_adapter(replace(run, resume=True))
    assert not steps
    assert (resumed.steps, resumed.best_step) == (whole.steps, whole.best_step)
    assert resumed.held_out_loss == whole.held_out_loss


def test_example_longer_than_the_context_is_refused(root: Path) -> None:
    long = write_texts(root / "long.jsonl", "ab " * 400)
    run = replace(adapter_run(root, long), data=DataConfig(train=(long,), max_tokens=4096))
    with pytest.raises(TrainingError, match="lower --max-tokens"):
        train_adapter(run)


def test_checkpoints_that_go_no_longer_count_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"checkpoint-{step}" for step in (2, 4, 6)]
    for path in paths:
        path.mkdir()
        mark_complete(path, 1.0)
    counted: list[list[str]] = []

    def look(path: Path) -> None:
        counted.append(sorted(folder.parent.name for folder in tmp_path.glob("*/complete.json")))

    monkeypatch.setattr(checkpoints.shutil, "rmtree", look)
    checkpoints.remove_older(tmp_path, best=paths[0])
    assert counted == [["checkpoint-2", "checkpoint-6"]]
    mark_complete(paths[1], 1.0)
    checkpoints.remove_older(tmp_path, best=paths[2])
    assert counted[1:] == [["checkpoint-4", "checkpoint-6"]]
    checkpoints.remove_older(tmp_path / "none", best=None)


def test_unfinished_work_is_neither_overwritten_nor_mixed_up(root: Path) -> None:
    run = adapter_run(root, root / "both.jsonl", "kept", keep_checkpoints=True, optimization=optimization(2))
    train_adapter(run)
    with pytest.raises(TrainingError, match="go on with --resume"):
        train_adapter(run)
    with pytest.raises(TrainingError, match="other settings, data or members"):
        train_adapter(replace(run, resume=True, rank=2))


def test_incomplete_checkpoints_do_not_count(tmp_path: Path) -> None:
    assert prepare_work_dir(tmp_path, "a", resume=False) is None
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    mark_complete(tmp_path / "checkpoint-2", 1.0)
    mark_complete(tmp_path / "checkpoint-10", 5.0)
    assert prepare_work_dir(tmp_path, "a", resume=True) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-12").exists()


def test_checkpoints_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(TrainingError, match="another program"):
        prepare_work_dir(tmp_path, "a", resume=True)
    assert (tmp_path / "checkpoint-5").exists()


def test_only_checkpoints_are_removed(tmp_path: Path) -> None:
    prepare_work_dir(tmp_path, "a", resume=False)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "mine.txt").write_text("kept")
    remove_work_dir(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
