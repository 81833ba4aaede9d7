"""Stage 2 trains the fusion alone, writes what the server loads, and learns which member fits."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft_adapters import adapt, save
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

from fusionserve.adapters.artifact_directory import open_directory
from fusionserve.errors import ArtifactError, TrainingError
from fusionserve.fusion.config import FusionConfig, Scope, ValueKind
from fusionserve.fusion.loader import in_call_order, read_fusion_config, read_fusion_params
from fusionserve.fusion.params import FusionParams, make_params
from fusionserve.training.adaptation_trainer import NO_HOOKS, AdaptationTrainer, training_arguments
from fusionserve.training.adapter_reading import read_adapter
from fusionserve.training.adapter_training import train_adapter
from fusionserve.training.data import load_data, read_rows
from fusionserve.training.evaluation import evaluate_loss
from fusionserve.training.frozen_base import FrozenBase, load_base
from fusionserve.training.fusion_measuring import placed_fusion
from fusionserve.training.fusion_members import make_fusion_config, read_members
from fusionserve.training.fusion_training import fusion_in_place, train_fusion
from fusionserve.training.training_summary import TrainingSummary
from fusionserve.training_config import DataConfig

pytestmark = ignoring_libraries


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write_base(folder / "base")
    write_texts(folder / "both.jsonl", LETTERS, DIGITS)
    for seed in (1, 2, 3):
        write_member(folder / f"m{seed}", seed)
    return folder


def train(root: Path, members: Mapping[str, Path] | None = None, **changes: object) -> TrainingSummary:
    members = members or {f"m{seed}": root / f"m{seed}" for seed in (1, 2)}
    return train_fusion(fusion_run(root, root / "both.jsonl", dict(members), **changes))


def load(directory: Path, base: FrozenBase) -> tuple[FusionConfig, FusionParams]:
    with open_directory(directory) as opened:
        config = in_call_order(read_fusion_config(opened), base.modules)
        return config, read_fusion_params(opened, config, base.modules)[0]


def test_the_fusion_learns_which_member_fits(root: Path) -> None:
    """Members that know one kind of text each: the fusion comes close to either on its own kind."""
    members = {}
    for name, kind in (("letters", LETTERS), ("digits", DIGITS)):
        data = write_texts(root / f"{name}.jsonl", kind)
        train_adapter(adapter_run(root, data, name, optimization=optimization(30)))
        members[name] = root / name
    summary = train(root, members, optimization=optimization(60), scope="layer")
    assert summary.held_out_loss is not None
    assert summary.held_out_loss_before is not None
    assert summary.held_out_loss < 0.75 * summary.held_out_loss_before

    base = load_base(str(root / "base"))
    weights = {}
    with placed_fusion(root / "mix", base, members) as placed:
        for kind in members:
            rows = read_rows(root / f"{kind}.jsonl", base.tokenizer, DataConfig(max_tokens=32))
            weights[kind] = placed.measure(rows)[1].mean_weights
    assert weights["letters"]["letters"] > weights["digits"]["letters"] + 0.2


@torch.no_grad()
def test_the_base_is_as_before(root: Path) -> None:
    base = load_base(str(root / "base"))
    token_ids = torch.arange(9).unsqueeze(0)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    logits = base.model(token_ids).logits
    run = fusion_run(root, root / "both.jsonl", {"m1": root / "m1", "m2": root / "m2"})
    with torch.enable_grad():
        train_fusion(replace(run, optimization=optimization(4, bf16=True)), base=base)
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    torch.testing.assert_close(base.model(token_ids).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "num_attentions", "num_values"),
    [
        ({"scope": "layer"}, 2, 0),
        ({"scope": "module", "value": "diagonal", "member_keys": False}, 4, 4),
        ({"value": "low_rank", "value_rank": 3, "base_member": True, "score_dropout": 0.2}, 2, 4),
        ({"modules": ("down_proj",), "temperature": 3.0, "entropy_penalty": 0.1}, 2, 0),
        ({"modules": ("*.layers.1.*",), "balance_penalty": 1.0}, 1, 0),
    ],
)
def test_every_option_is_in_the_artifact_and_trained(
    changes: dict[str, object], num_attentions: int, num_values: int, root: Path
) -> None:
    summary = train(root, out=root / "option", optimization=optimization(3), **changes)
    config, params = load(root / "option", load_base(str(root / "base")))
    assert (len(params.attentions), len(params.values)) == (num_attentions, num_values)
    assert config.scope is Scope(changes.get("scope", "layer"))
    assert config.value is ValueKind(changes.get("value", "none"))
    assert config.member_keys is changes.get("member_keys", True)
    assert config.temperature == changes.get("temperature", 1.0)
    trained = sum(tensor.numel() for _, tensor in params.named_tensors())
    assert summary.trainable_parameters == trained
    assert summary.fusion is not None
    assert sum(summary.fusion.mean_weights.values()) == pytest.approx(1, abs=1e-3)
    assert list(summary.fusion.mean_weights) == list(config.weight_names)
    for value in params.values.values():
        assert float(value.distance_from_identity().detach()) > 0


@pytest.mark.parametrize(
    ("value", "decayed"),
    [
        ("diagonal", {"query.weight", "key.weight"}),
        ("low_rank", {"query.weight", "key.weight", "value.up.weight", "value.down.weight"}),
    ],
)
def test_weight_decay_leaves_v_near_the_identity(value: str, decayed: set[str], root: Path) -> None:
    """A step without gradients: V decays towards I, which a diagonal at zero is not, and members keep their keys."""
    base = load_base(str(root / "base"))
    run = fusion_run(
        root,
        root / "both.jsonl",
        {"m1": root / "m1", "m2": root / "m2"},
        value=value,
        optimization=optimization(1, weight_decay=0.5),
    )
    members = read_members(run, base)
    config = make_fusion_config(run, base, members)
    params = make_params(config, base.modules)
    tensors = dict(params.named_tensors())
    for tensor in tensors.values():
        tensor.data += 1
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    data = load_data(run.data, base.tokenizer, run.optimization.seed)
    with fusion_in_place(base, config, params, members):
        arguments = training_arguments(run, len(data.train), has_held_out=False)
        optimizer = AdaptationTrainer(base.model, data, arguments, NO_HOOKS).create_optimizer()
        for tensor in tensors.values():
            tensor.grad = torch.zeros_like(tensor)
        optimizer.step()
    changed = [name for name, tensor in tensors.items() if not torch.equal(tensor, before[name])]
    assert {name.split("_proj.")[1] for name in changed} == decayed


def test_the_written_weights_are_the_best_ones(root: Path) -> None:
    summary = train(root, optimization=optimization(8))
    base = load_base(str(root / "base"))
    run = fusion_run(root, root / "both.jsonl", {"m1": root / "m1", "m2": root / "m2"})
    config, params = load(root / "mix", base)
    held_out = load_data(run.data, base.tokenizer, run.optimization.seed).held_out
    with fusion_in_place(base, config, params, read_members(run, base)):
        assert evaluate_loss(base.model, held_out, 4).loss == pytest.approx(summary.held_out_loss, rel=1e-5)
    losses = [entry["eval_loss"] for entry in summary.history if entry.get("eval_loss") and entry["step"]]
    assert summary.held_out_loss == pytest.approx(min(losses), rel=1e-5)


def test_one_member_equals_that_member(root: Path) -> None:
    """A fusion of one adapter has nothing to choose: its loss is the adapter's."""
    summary = train(root, {"m1": root / "m1"}, optimization=optimization(2), out=root / "one")
    losses = {entry["eval_loss"] for entry in summary.history if "eval_loss" in entry}
    assert max(losses) == pytest.approx(min(losses), rel=1e-5)
    assert summary.fusion is not None
    assert summary.fusion.entropy == 0


def test_seeds_differ_and_repeat(root: Path) -> None:
    first, again, other = (
        train(root, optimization=optimization(3, seed=seed)).held_out_loss for seed in (1, 1, 2)
    )
    assert first == again != other


def test_the_artifact_names_no_path(root: Path) -> None:
    train(root, optimization=optimization(2), notes={"experiment": "test"})
    for name in ("fusion_config.json", "training_summary.json"):
        text = (root / "mix" / name).read_text()
        assert not re.search(r"[\"'=]/|" + re.escape(str(root)), text)
    training = json.loads((root / "mix" / "fusion_config.json").read_text())["training"]
    assert training["experiment"] == "test"
    assert training["mean_weights"].keys() == {"m1", "m2"}


def test_the_artifact_tells_how_its_members_are_scaled(root: Path) -> None:
    train(root, optimization=optimization(2))
    base = load_base(str(root / "base"))
    config, _ = load(root / "mix", base)
    weights = [read_adapter(root / member.name, base) for member in config.members]
    assert [member.scalings_digest for member in config.members] == [m.scalings_digest for m in weights]


def test_members_that_cannot_be_had_are_named(root: Path) -> None:
    with pytest.raises(TrainingError, match="member gone: there is no such adapter directory"):
        train(root, {"gone": root / "gone"})
    with pytest.raises(
        TrainingError, match="no member adapts a module 'v_proj'; they adapt down_proj, q_proj"
    ):
        train(root, modules=("v_proj",))
    run = fusion_run(root, root / "both.jsonl", {"a": root / "m1"})
    with pytest.raises(TrainingError, match="named twice"):
        train_fusion(replace(run, members=run.members * 2))


@pytest.mark.parametrize(
    "change", [{"d_key": 5000}, {"notes": {"loss": float("nan")}}, {"notes": {"at": object()}}]
)
def test_what_the_server_would_refuse_is_not_trained(root: Path, change: dict[str, object]) -> None:
    with pytest.raises(TrainingError, match="the server would refuse such a fusion"):
        train(root, **change)


def test_a_dora_member_is_refused(root: Path) -> None:
    base = load_base(str(root / "base"))
    save(adapt(base.model, target_modules=["q_proj"], use_dora=True), root / "dora")
    assert read_adapter(root / "dora", base, allow_base_mismatch=True).has_magnitudes
    with pytest.raises(ArtifactError, match="is a DoRA"):
        train(root, {"m1": root / "m1", "dora": root / "dora"}, allow_base_mismatch=True)


@pytest.mark.parametrize("modules", [(), ("q_proj",)])
def test_a_member_that_adapts_the_embedding_is_refused(modules: tuple[str, ...], root: Path) -> None:
    base = load_base(str(root / "base"))
    save(adapt(base.model, target_modules=["q_proj", "embed_tokens"]), root / "embedding")
    with pytest.raises(ArtifactError, match="member embedding changes the input embedding") as caught:
        train(root, {"embedding": root / "embedding"}, allow_base_mismatch=True, modules=modules)
    assert caught.value.reason == "MEMBER_UNSUPPORTED"


def test_a_member_that_adapts_the_head_alone_is_weighed_there(root: Path) -> None:
    base = load_base(str(root / "base"))
    save(adapt(base.model, target_modules=["q_proj", "lm_head"]), root / "head")
    train(
        root,
        {"head": root / "head"},
        allow_base_mismatch=True,
        out=root / "with_head",
        optimization=optimization(1),
    )
    config, _ = load(root / "with_head", base)
    assert config.modules[-1] == "lm_head"
