"""`fusionserve loadtest`, once its settings are checked: runs, prints the tables, writes report and plots."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from fusionserve.client.server_access import IN_THE_CLEAR, ServerAccess
from fusionserve.errors import PreconditionError
from fusionserve.loadtest.generate_load import generate_load
from fusionserve.loadtest.load_report import Json, to_report, to_request_line
from fusionserve.loadtest.outcome import Outcome
from fusionserve.loadtest.plots import draw_plots
from fusionserve.loadtest.text_report import to_text
from fusionserve.loadtest_config import LoadConfig

REPORT, REQUESTS = "report.json", "requests.jsonl"


def run(config: LoadConfig, out: Path | None, access: ServerAccess = IN_THE_CLEAR) -> Json:
    """Prints the outcome, writes it into the folder `out` if there is one, and returns the report.

    Raises as generate_load does, and PreconditionError if the folder cannot be made.
    """
    if out is not None:
        _make_folder(out)  # before the run, which would be lost
    outcome = asyncio.run(generate_load(config, access))
    report = to_report(outcome)
    print(to_text(outcome, report))
    if out is not None:
        print(f"\nwritten to {out}: {', '.join(path.name for path in write_files(outcome, report, out))}")
    return report


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PreconditionError(f"{out}: {error.strerror}") from None


def write_files(outcome: Outcome, report: Json, out: Path) -> list[Path]:
    """Writes the report, a line per request, and the plots; files of these names are replaced."""
    out.mkdir(parents=True, exist_ok=True)
    (out / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lines = (
        json.dumps(to_request_line(record, outcome.residencies[record.index])) for record in outcome.records
    )
    (out / REQUESTS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return [out / REPORT, out / REQUESTS, *draw_plots(outcome, report, out)]


def failings(report: Json) -> str:
    """What keeps a strict run from passing, in a few words; empty if nothing does."""
    requests, missed = report["requests"], report["goodput"]["missed"]
    counts = {
        "failed": requests["failed"],
        "were not sent": requests["not_sent"],
        **{f"missed {name}": count for name, count in missed.items()},
    }
    found = [f"{count} {what}" for what, count in counts.items() if count]
    total = requests["sent"] + requests["not_sent"]
    if not total:
        return "no request was sent"
    return f"of {total} requests {', '.join(found)}" if found else ""
