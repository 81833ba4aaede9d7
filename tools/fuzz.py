"""Fuzzes what strangers can reach, guided by coverage: files of adapters and fusions, or requests.

    make fuzz                                        both, for some minutes
    python -P tools/fuzz.py artifacts --runs 1000000
    python -P tools/fuzz.py requests --runs 200000 --save

What must hold is in tests/support/fuzz_artifacts.py and fuzz_requests.py, the mutations in mutations.py; a tenth of
them are libFuzzer's own. A finding ends the run with its input in build/fuzz. `--save` puts the smallest input of each
outcome into the corpus, which the tests replay. Needs atheris, which `make fuzz` installs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import atheris

ROOT = Path(__file__).parent.parent
CORPUS = ROOT / "tests" / "hardening" / "corpus"
WORK = ROOT / "build" / "fuzz"
sys.path.insert(0, str(ROOT / "tests" / "support"))
_INSTRUMENTED = ["fusionserve.adapters", "fusionserve.fusion", "fusionserve.server"]
with atheris.instrument_imports(include=_INSTRUMENTED):
    import fuzz_artifacts
    import fuzz_requests
    import fuzz_seeds
    import mutations

Target = Callable[[bytes], str]
Mutate = Callable[[bytes, random.Random], bytes]
SUBJECTS: dict[str, tuple[Target, Mutate, Callable[[], list[bytes]]]] = {
    "artifacts": (fuzz_artifacts.try_artifact, mutations.mutate_artifact, fuzz_seeds.artifacts),
    "requests": (fuzz_requests.try_request, mutations.mutate_request, fuzz_seeds.requests),
}
_SHOW_EVERY = 50_000
_MAX_INPUT_BYTES = 1 << 16
_OWN_SHARE, _FRESH_SHARE = 0.1, 0.5


def main() -> None:
    """Parses the command line and fuzzes; libFuzzer ends the process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", choices=sorted(SUBJECTS))
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    Fuzzing(arguments.subject, saves=arguments.save, runs=arguments.runs).run(arguments.seed)


class Fuzzing:
    """One run, with a count of what came of the inputs and the smallest of each outcome."""

    def __init__(self, subject: str, *, saves: bool, runs: int) -> None:
        self._subject = subject
        self._target, self._mutate, make_seeds = SUBJECTS[subject]
        self._valid = make_seeds()
        self._saves = saves
        self._runs = runs
        self._outcomes: Counter[str] = Counter()
        self._smallest: dict[str, bytes] = {}
        self._started_s = time.monotonic()

    def run(self, seed: int) -> None:
        """Fuzzes from the corpus and the seeds. Does not return."""
        folder = WORK / self._subject
        folder.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate([*self._valid, *self._committed().values()]):
            (folder / f"seed-{number}").write_bytes(data)
        options = [f"-runs={self._runs}", f"-seed={seed}", f"-max_len={_MAX_INPUT_BYTES}", "-timeout=20"]
        options += ["-rss_limit_mb=6000", "-verbosity=0", f"-artifact_prefix={WORK}/{self._subject}-finding-"]
        atheris.Setup([sys.argv[0], *options, str(folder)], self._try, custom_mutator=self._change)
        atheris.Fuzz()

    def _try(self, data: bytes) -> None:
        outcome = self._target(data)
        self._outcomes[outcome] += 1
        known = self._smallest.get(outcome)
        if known is None or len(data) < len(known):
            self._smallest[outcome] = data
        total = self._outcomes.total()
        if total % _SHOW_EVERY == 0 or total == self._runs:
            self._show(total)

    def _change(self, data: bytes, max_size: int, seed: int) -> bytes:
        draws = random.Random(seed)
        if draws.random() < _OWN_SHARE:
            return bytes(atheris.Mutate(data, max_size))
        # Mutants of mutants are refused for the first thing that is wrong with them: half start from something valid.
        start = draws.choice(self._valid) if draws.random() < _FRESH_SHARE else data
        return self._mutate(start, draws)[:max_size]

    def _show(self, total: int) -> None:
        rate = total / (time.monotonic() - self._started_s)
        print(
            f"{total} inputs, {rate:.0f} a second: {json.dumps(dict(self._outcomes.most_common()))}",
            flush=True,
        )
        if self._saves:
            CORPUS.mkdir(exist_ok=True)
            inputs = {**self._committed(), **self._smallest}
            with zipfile.ZipFile(CORPUS / f"{self._subject}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                for outcome, data in sorted(inputs.items()):
                    archive.writestr(zipfile.ZipInfo(outcome), data)

    def _committed(self) -> dict[str, bytes]:
        path = CORPUS / f"{self._subject}.zip"
        if not path.exists():
            return {}
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}


if __name__ == "__main__":
    main()
