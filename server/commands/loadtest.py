"""`fusionserve loadtest`."""

from __future__ import annotations

import argparse

from fusionserve.client import ClientError
from fusionserve.server.command_errors import CommandError, FailedCallError
from fusionserve.server.commands.connection import to_access
from fusionserve.server.commands.extras import import_from_extra
from fusionserve.server.commands.loadtest_settings import GROUPS, SETTINGS, to_load_config
from fusionserve.server.settings import CommandParser, add_settings, resolve

DESCRIPTION = """\
Sends streams to a running server and reports time to first token (TTFT), gaps between tokens (ITL,
TPOT), end-to-end time, throughput, goodput, errors and fairness; with --out as JSON and plots, too.
LENGTHS: 128, or 16..256 (uniform), or lognormal:MEDIAN:SIGMA:MAX. DURATION: 30s, 200ms, 2m."""
EPILOG = """\
examples:
  fusionserve loadtest --concurrency 16 --requests 200 --warm-up 16 --out report
  fusionserve loadtest --rate 5 --duration 1m --zipf 1 --slo-ttft 500ms --slo-tpot 100ms
Each flag has an environment variable, FUSIONSERVE_LOADTEST_RATE and so on. More: docs/loadtest.md."""


def main(argv: list[str]) -> int:
    """Checks every setting, puts the server under load, and prints how it did."""
    values = resolve(SETTINGS, _parser().parse_args(argv))
    config, access = to_load_config(values), to_access(values)
    command = import_from_extra("loadtest", "command")
    try:
        report = command.run(config, values["out"], access)
    except ClientError as error:
        raise FailedCallError(str(error)) from error
    failings = command.failings(report)
    if failings and values["strict"]:
        raise CommandError(failings)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="fusionserve loadtest",
        usage="fusionserve loadtest [--rate X | --concurrency N] [--requests N] [--duration DURATION] ...",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=_one_screen,
        add_help=False,
    )
    groups = [parser.add_argument_group(title) for title in GROUPS]
    for group, settings in zip(groups, GROUPS.values(), strict=True):
        add_settings(group, settings)
    # Who reads the page has found it, and it is full.
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    return parser


def _one_screen(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=100)
