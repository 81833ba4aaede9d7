"""What `fusionserve adapters` and `fusionserve fusions` share: actions on whatever a server loads by name."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from fusionserve.client import Client
from fusionserve.server import setting_kinds as kinds
from fusionserve.server.commands.connection import CONNECTION_SETTINGS, connected
from fusionserve.server.settings import CommandParser, Setting, Values, add_settings, config_setting, resolve

ItemT = TypeVar("ItemT")
ItemT_co = TypeVar("ItemT_co", covariant=True)


class Life(Protocol[ItemT_co]):
    """The client's calls about one kind."""

    def load(
        self, name: str, path: str | None = None, *, pin: bool = False, sha256: str | None = None
    ) -> ItemT_co:
        """Loads one."""

    def reload(
        self, name: str, path: str | None = None, *, pin: bool | None = None, sha256: str | None = None
    ) -> ItemT_co:
        """Publishes a new version."""

    def unload(self, name: str, *, force: bool = False) -> ItemT_co:
        """Withdraws one."""

    def get(self, name: str) -> ItemT_co:
        """Describes one."""

    def list(self) -> Iterable[ItemT_co]:
        """All of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactCommand(Generic[ItemT]):
    """One command: `noun` is adapter or fusion, `to_row` gives the cells under `headings`."""

    noun: str
    life: Callable[[Client], Life[ItemT]]
    headings: tuple[str, ...]
    to_row: Callable[[ItemT], tuple[str, ...]]

    def run(self, argv: list[str]) -> int:
        """Runs one action and prints what it is about."""
        actions = self._actions()
        arguments = self._parser(actions).parse_args(argv)
        # One configuration file serves all actions.
        others = [setting for _, settings in actions.values() for setting in settings]
        values = resolve((*actions[arguments.action][1], *self._shared()), arguments, others)
        with connected(values) as client:
            items = _act(self.life(client), arguments, values)
        print(_to_json(items) if values["json"] else self.to_table(items))
        return 0

    def to_table(self, items: Iterable[ItemT]) -> str:
        """The items below aligned headings."""
        rows = [self.headings, *(self.to_row(item) for item in items)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    @property
    def _env_prefix(self) -> str:
        return f"FUSIONSERVE_{self.noun.upper()}S_"

    def _actions(self) -> dict[str, tuple[str, tuple[Setting, ...]]]:
        noun = self.noun
        path = Setting(
            name="path",
            kind=kinds.TEXT,
            help=f"folder under one of the server's {noun} folders",
            default_text="the name",
            env_prefix=self._env_prefix,
        )
        pin = self._flag("pin", "never evict it to make room")
        sha256 = Setting(
            name="sha256",
            kind=kinds.TEXT,
            help="load it only if its weights file has this digest",
            env_prefix=self._env_prefix,
        )
        force = self._flag("force", "end its running requests instead of waiting for them")
        article = "an" if noun[0] in "aeiou" else "a"
        return {
            "list": (f"list all {noun}s, loaded or available on disk", ()),
            "get": (f"describe one {noun}", ()),
            "load": (f"load {article} {noun} and wait until it can be used", (path, pin, sha256)),
            "reload": (f"publish a new version of {article} {noun}", (path, pin, sha256)),
            "unload": (f"withdraw {article} {noun}", (force,)),
        }

    def _shared(self) -> tuple[Setting, ...]:
        return (
            self._flag("json", "print as JSON"),
            *CONNECTION_SETTINGS,
            config_setting(self._env_prefix),
        )

    def _flag(self, name: str, text: str) -> Setting:
        return Setting(
            name=name, kind=kinds.SWITCH, help=text, default=False, is_flag=True, env_prefix=self._env_prefix
        )

    def _parser(self, actions: dict[str, tuple[str, tuple[Setting, ...]]]) -> argparse.ArgumentParser:
        noun = self.noun
        parser = CommandParser(prog=f"fusionserve {noun}s", description=f"Manage the {noun}s of a server.")
        subparsers = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
        for name, (text, settings) in actions.items():
            action = subparsers.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
            if name != "list":
                action.add_argument("name", metavar="NAME", type=_name, help=f"the {noun}'s name")
            add_settings(action, (*settings, *self._shared()))
        return parser


def to_size(num_bytes: int) -> str:
    """Bytes as a person reads them; a dash for none."""
    return f"{num_bytes / (1 << 20):.1f}MiB" if num_bytes else "-"


def _name(text: str) -> str:
    try:
        return kinds.parse_text(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _act(life: Life[ItemT], arguments: argparse.Namespace, values: Values) -> list[ItemT]:
    match arguments.action:
        case "get":
            return [life.get(arguments.name)]
        case "load":
            return [life.load(arguments.name, values["path"], pin=values["pin"], sha256=values["sha256"])]
        case "reload":
            return [
                life.reload(
                    arguments.name, values["path"], pin=values["pin"] or None, sha256=values["sha256"]
                )
            ]
        case "unload":
            return [life.unload(arguments.name, force=values["force"])]
    return list(life.list())


def _to_json(items: Iterable[object]) -> str:
    return json.dumps([dataclasses.asdict(item) for item in items], default=str, indent=2)  # type: ignore[call-overload]
