"""`fusionserve train`."""

from __future__ import annotations

import argparse

from fusionserve.server.commands.train_settings import (
    ALL_ADAPTER_SETTINGS,
    ALL_FUSION_SETTINGS,
    to_adapter_run,
    to_fusion_run,
)
from fusionserve.server.commands.training_extra import import_training
from fusionserve.server.settings import CommandParser, add_settings, resolve

STAGES = {
    "adapter": ("train a LoRA adapter on a frozen base", ALL_ADAPTER_SETTINGS, to_adapter_run),
    "fusion": ("train an AdapterFusion over frozen adapters", ALL_FUSION_SETTINGS, to_fusion_run),
}


def main(argv: list[str]) -> int:
    """Checks every setting, trains, and prints what it came to."""
    arguments = _parser().parse_args(argv)
    _, settings, to_run = STAGES[arguments.stage]
    run = to_run(resolve(settings, arguments))
    command = import_training("command")
    print(getattr(command, f"run_{arguments.stage}")(run))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="fusionserve train", description="Train an adapter or a fusion.")
    stages = parser.add_subparsers(dest="stage", metavar="STAGE", required=True)
    for name, (text, settings, _) in STAGES.items():
        stage = stages.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        add_settings(stage, settings)
    return parser
