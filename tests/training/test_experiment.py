"""The experiment compares what it says it compares, and goes on where it was."""

import lzma
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fusionserve.config import EMBEDDED
from fusionserve.training.data import TrainingData, read_rows
from fusionserve.training.evaluation import evaluate_loss
from fusionserve.training.experiment import probe
from fusionserve.training.experiment.catalogues import multilingual_documents
from fusionserve.training.experiment.lab import MIXED, Lab
from fusionserve.training.experiment.plot import draw_experiment
from fusionserve.training.experiment.report import by_system, distance_table, perplexities, to_report
from fusionserve.training.experiment.results import Result, Results, spread
from fusionserve.training.experiment.size_curve import NEW, OTHERS, OWN, WITH_OWN, run_size_curve
from fusionserve.training.experiment.systems import (
    BASE,
    FUSION,
    GATE,
    GATE_WITH_VALUE,
    SHIPPED,
    STATIC,
    UNIFORM,
    VARIANTS,
    run_systems,
)
from fusionserve.training.experiment.texts import interleaved
from fusionserve.training.experiment.weighings import LinearGate
from fusionserve.training.frozen_base import load_base
from fusionserve.training.rows import Losses
from fusionserve.training_config import DataConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # PEFT reads it
    "ignore:.*torch.jit.script_method.*:DeprecationWarning",
)

SHIPPED_TEXTS = Path(__file__).parents[2] / "examples" / "fusion_data" / "messages"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The shipped model with a row of each domain to learn from and one to measure on, and one step to train."""
    base = load_base(None)
    adapters = {path.name: path for path in sorted((EMBEDDED / "adapters").iterdir())}
    shape = DataConfig(max_tokens=64)
    rows = {
        domain: read_rows(EMBEDDED / "heldout" / f"{domain}.txt", base.tokenizer, shape)
        for domain in adapters
    }
    texts = {domain: found[:1] for domain, found in rows.items()} | {
        kind: rows["perl"][1:2] for kind in MIXED
    }
    learned = [row for found in rows.values() for row in found[2:3]]
    return Lab(
        base=base,
        adapters=adapters,
        data=TrainingData(learned, learned[:2], Losses()),
        texts=texts,
        scratch=tmp_path_factory.mktemp("experiment"),
        steps=1,
    )


def test_a_single_adapter_costs_what_it_costs_in_peft(lab: Lab) -> None:
    weights = [float(name == "perl") for name in lab.domains]
    measured = lab.measure_fixed("perl", lab.adapters, weights)
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED / "base", dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, lab.adapters["perl"])
    for text, rows in lab.texts.items():
        assert measured.losses[text] == pytest.approx(evaluate_loss(peft, rows, 8).loss, abs=1e-5)


def test_no_weight_is_the_base(lab: Lab) -> None:
    measured = lab.measure_fixed(BASE, lab.adapters, [0.0] * len(lab.domains))
    for text, rows in lab.texts.items():
        assert measured.losses[text] == pytest.approx(evaluate_loss(lab.base.model, rows, 8).loss, abs=1e-5)


def test_an_untrained_gate_is_even_and_skips_the_left_out() -> None:
    gate = LinearGate(d_in=3, num_members=3)
    allowed = torch.tensor([True, True, False])
    weights = gate(torch.randn(2, 3), *[torch.empty(0)] * 3, allowed, 0.0)
    assert weights.tolist() == [[0.5, 0.5, 0.0]] * 2


def test_every_system_runs_and_is_reported(lab: Lab, tmp_path: Path) -> None:
    results = Results(tmp_path / "results", {"steps": lab.steps})
    runs = by_system(run_systems(lab, results, seeds=(0,)))
    assert set(runs) == {BASE, *lab.domains, UNIFORM, SHIPPED, STATIC, GATE, GATE_WITH_VALUE, *VARIANTS}
    assert [result.seed for result in runs[FUSION]] == [0]
    for variant in (*VARIANTS, GATE, GATE_WITH_VALUE, STATIC):
        assert runs[variant][0].trained > 0
        assert all(math.isfinite(loss) for loss in runs[variant][0].losses.values())
    # One step from nearly even weights: a fusion is not far from the uniform blend.
    assert runs[FUSION][0].losses["perl"] == pytest.approx(runs[UNIFORM][0].losses["perl"], abs=0.3)
    again = by_system(run_systems(lab, results, seeds=(0,)))
    assert again[FUSION][0].seconds == runs[FUSION][0].seconds, "what is there is not run again"

    curve = {way: {50: [_new(2.0)], 200: [_new(1.5), _new(1.0)]} for way in (OWN, WITH_OWN, OTHERS)}
    sizes = {way: by_size | {1000: [_new(1.0)]} for way, by_size in curve.items()}
    alone = dict.fromkeys((BASE, UNIFORM, *lab.domains), 9.0)
    report = to_report(runs, alone, sizes, lab.domains)
    assert f"| {SHIPPED} | 1 |" in report
    assert "| own adapter | 7.39 | 3.60 ± 1.25 | 2.72 |" in report
    draw_experiment(tmp_path / "x.png", runs, (UNIFORM, FUSION), SHIPPED, lab.domains, sizes)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_size_curve_trains_an_adapter_and_fusions(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fusionserve.training.experiment.size_curve as size_curve

    monkeypatch.setattr(size_curve, "SIZES", (12,))
    monkeypatch.setattr(size_curve, "STEPS", 2)
    texts = tmp_path / "texts"
    for name, count in (("train", 40), ("held_out", 5)):
        lines = lzma.decompress((SHIPPED_TEXTS / f"{name}.txt.xz").read_bytes()).splitlines(keepends=True)
        (texts / NEW).mkdir(parents=True, exist_ok=True)
        (texts / NEW / f"{name}.txt.xz").write_bytes(lzma.compress(b"".join(lines[: 2 * count])))
    found = list(run_size_curve(lab, texts, Results(tmp_path / "results", {}), seeds=(0,)))
    by_name = {result.system: result for size, result in found if size}
    assert set(by_name) == {OWN, WITH_OWN, OTHERS}
    assert NEW in by_name[WITH_OWN].weights[NEW]
    alone = {result.system: result.losses[NEW] for size, result in found if not size}
    assert by_name[OWN].losses[NEW] < alone[BASE]


def test_results_of_other_settings_are_made_again(tmp_path: Path) -> None:
    calls = []

    def make() -> Result:
        calls.append(1)
        return _new(float(len(calls)))

    first = Results(tmp_path, {"steps": 1}).get("x", 0, make)
    assert Results(tmp_path, {"steps": 1}).get("x", 0, make) == first
    assert Results(tmp_path, {"steps": 2}).get("x", 0, make).losses[NEW] == 2.0
    assert Results(tmp_path, {"steps": 2}).get("x", 0, make, {"rate": 1}).losses[NEW] == 3.0


def test_distances_are_to_the_best_adapter_of_each_text() -> None:
    domains = ("a", "b")
    losses = {"base": (3.0, 3.0), "a": (1.0, 2.0), "b": (2.0, 1.5), "fusion": (1.0, 1.0)}
    runs = by_system(
        Result(system=name, seed=0, losses={"a": a, "b": b, "code_prose": 1.0, "catalogues": 1.0})
        for name, (a, b) in losses.items()
    )
    assert perplexities(runs["base"][0], domains)["mixture"] == pytest.approx(math.exp(3.0))
    line = distance_table(runs, domains).splitlines()[-1]
    # text b: exp(1.0 - 1.5); the mixture: exp(1.0 - 1.5), of which a alone has the least
    assert line == "| fusion | +0.0 % | -39.3 % | -39.3 % | +0.0 % | +0.0 % |"


def test_spread_is_that_of_the_seeds() -> None:
    assert str(spread([1.0, 2.0, 3.0])) == "2.00 ± 1.00"
    assert str(spread([1.0])) == "1.00"


def test_probe_tells_texts_apart_where_attention_has_looked(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_TRAIN_WINDOWS", 4)
    monkeypatch.setattr(probe, "_HELD_OUT_WINDOWS", 1)
    monkeypatch.setattr(probe, "MAX_TOKENS", 128)
    monkeypatch.setattr(probe, "_STEPS", 60)
    texts = [EMBEDDED / "heldout" / f"{domain}.txt" for domain in ("cpp", "polish")]
    found = dict(probe.probe(lab.base, texts, texts))
    assert len(found) == 4 * lab.base.model.config.num_hidden_layers
    assert found["model.layers.0.self_attn.o_proj"] > 0.9


def test_interleaved_documents_take_turns() -> None:
    document = next(iter(interleaved(EMBEDDED / "heldout")))
    assert document.name.startswith("changelog-cpp")
    assert "#include" in document.text or "template" in document.text or "namespace" in document.text


def test_languages_that_are_not_installed_give_no_documents() -> None:
    assert list(multilingual_documents(("xx_none", "pl"), entries=8)) == []


def _new(loss: float) -> Result:
    return replace(Result(system="x", seed=0, losses={}), losses={NEW: loss})
