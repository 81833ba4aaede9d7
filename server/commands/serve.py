"""`fusionserve serve`."""

from __future__ import annotations

import importlib
import logging
import os

from fusionserve.config import EngineConfig
from fusionserve.metrics import AdapterLabels
from fusionserve.server.app import LoadEngine, serve
from fusionserve.server.engine_facade import EngineFacade
from fusionserve.server.serve_settings import SERVE_SETTINGS, to_engine_config, to_server_config
from fusionserve.server.settings import CommandParser, add_settings, resolve


def main(argv: list[str]) -> int:
    """Serves until told to stop."""
    return run(argv, load_engine)


def run(argv: list[str], load_engine: LoadEngine) -> int:
    """Checks every setting, then serves with the engine that `load_engine` makes."""
    parser = CommandParser(prog="fusionserve serve", description="Serve a model and its adapters over gRPC.")
    add_settings(parser, SERVE_SETTINGS)
    values = resolve(SERVE_SETTINGS, parser.parse_args(argv))
    engine_config, server_config = to_engine_config(values), to_server_config(values)
    level = values["log-level"].upper()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return serve(engine_config, server_config, load_engine)


def load_engine(config: EngineConfig, adapter_labels: AdapterLabels) -> EngineFacade:
    """The real engine."""
    # Else idle workers of OpenMP, which reads this when torch is imported, keep a core from everybody for milliseconds.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Importing torch takes seconds: it waits until the settings are checked and the ports are bound.
    module = importlib.import_module("fusionserve.engine.async_engine")
    engine: EngineFacade = module.AsyncEngine.load(config, adapter_labels)
    return engine
