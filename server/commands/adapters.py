"""`fusionserve adapters`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable

from fusionserve.client import Adapter, Client
from fusionserve.server import setting_kinds as kinds
from fusionserve.server.commands.connection import CONNECTION_SETTINGS, connected
from fusionserve.server.settings import CommandParser, Setting, Values, add_settings, config_setting, resolve

ENV_PREFIX = "FUSIONSERVE_ADAPTERS_"


def _flag(name: str, text: str) -> Setting:
    return Setting(
        name=name, kind=kinds.SWITCH, help=text, default=False, is_flag=True, env_prefix=ENV_PREFIX
    )


PATH = Setting(
    name="path",
    kind=kinds.TEXT,
    help="folder under one of the server's adapter folders",
    default_text="the name",
    env_prefix=ENV_PREFIX,
)
PIN = _flag("pin", "never evict it to make room")
FORCE = _flag("force", "end its running requests instead of waiting for them")
SHARED = (_flag("json", "print as JSON"), *CONNECTION_SETTINGS, config_setting(ENV_PREFIX))
ACTIONS = {
    "list": ("list all adapters, loaded or available on disk", ()),
    "get": ("describe one adapter", ()),
    "load": ("load an adapter and wait until it can be used", (PATH, PIN)),
    "reload": ("publish a new version of an adapter", (PATH, PIN)),
    "unload": ("withdraw an adapter", (FORCE,)),
}
HEADINGS = ("NAME", "STATE", "RESIDENCY", "VERSION", "RANK", "SIZE", "PINNED", "ACTIVE", "DIGEST")


def main(argv: list[str]) -> int:
    """Runs one action and prints the adapters it is about."""
    arguments = _parser().parse_args(argv)
    values = resolve((*ACTIONS[arguments.action][1], *SHARED), arguments)
    with connected(values) as client:
        adapters = _act(client, arguments, values)
    print(_to_json(adapters) if values["json"] else to_table(adapters))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="fusionserve adapters", description="Manage the adapters of a server.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, (text, settings) in ACTIONS.items():
        action = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name != "list":
            action.add_argument("adapter", metavar="NAME", help="the adapter's name")
        add_settings(action, (*settings, *SHARED))
    return parser


def _act(client: Client, arguments: argparse.Namespace, values: Values) -> list[Adapter]:
    match arguments.action:
        case "get":
            return [client.adapters.get(arguments.adapter)]
        case "load":
            return [client.adapters.load(arguments.adapter, values["path"], pin=values["pin"])]
        case "reload":
            return [client.adapters.reload(arguments.adapter, values["path"], pin=values["pin"])]
        case "unload":
            return [client.adapters.unload(arguments.adapter, force=values["force"])]
    return list(client.adapters.list())


def to_table(adapters: Iterable[Adapter]) -> str:
    """The adapters below aligned headings."""
    rows = [HEADINGS, *(_row(adapter) for adapter in adapters)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _row(adapter: Adapter) -> tuple[str, ...]:
    return (
        adapter.name,
        adapter.state,
        adapter.residency,
        str(adapter.version or "-"),
        str(adapter.max_rank or "-"),
        f"{adapter.host_bytes / (1 << 20):.1f}MiB" if adapter.host_bytes else "-",
        "yes" if adapter.pinned else "no",
        str(adapter.active_requests),
        adapter.digest[:12] or "-",
    )


def _to_json(adapters: list[Adapter]) -> str:
    return json.dumps([dataclasses.asdict(adapter) for adapter in adapters], default=str, indent=2)
