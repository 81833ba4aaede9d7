"""The committed corpus of fuzzing, replayed: every outcome that a run has met, by the smallest input that had it."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz_artifacts import try_artifact
from fuzz_requests import try_request
from fuzz_seeds import artifacts, requests

from fusionserve.adapters import lora_loader
from fusionserve.server import checks

CORPUS = Path(__file__).parent / "corpus"
MAX_CORPUS_BYTES = 200_000


def committed(name: str) -> dict[str, bytes]:
    with zipfile.ZipFile(CORPUS / name) as archive:
        return {entry: archive.read(entry) for entry in archive.namelist()}


@pytest.mark.parametrize(
    ("name", "target", "least"), [("artifacts.zip", try_artifact, 17), ("requests.zip", try_request, 18)]
)
def test_corpus_has_the_outcomes_it_had(name: str, target: Callable[[bytes], str], least: int) -> None:
    inputs = committed(name)
    assert len(inputs) >= least
    assert {outcome: target(data) for outcome, data in inputs.items()} == {
        outcome: outcome for outcome in inputs
    }
    assert (CORPUS / name).stat().st_size < MAX_CORPUS_BYTES


def test_seeds_are_valid_and_not() -> None:
    assert [try_artifact(data) for data in artifacts()].count("OK") >= 12
    assert {try_request(data) for data in requests()} > {"OK", "OUT_OF_RANGE", "ADAPTER_ID_INVALID"}


def test_targets_notice_a_loader_that_looks_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_loader, "_check_magnitude", lambda spec, largest: None)
    with pytest.raises(AssertionError):
        try_artifact(committed("artifacts.zip")["NOT_FINITE"])


def test_targets_notice_a_check_that_looks_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "check_between", lambda *arguments: None)
    with pytest.raises(AssertionError):
        try_request(committed("requests.zip")["NOT_FINITE"])
