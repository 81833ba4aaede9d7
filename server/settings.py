"""Settings, each declared once: flag, environment variable, configuration key and help are derived from it.

A flag wins over the environment, the environment over the configuration file, the file over the default.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fusionserve.server import setting_kinds
from fusionserve.server.command_errors import UsageError
from fusionserve.server.setting_kinds import Kind

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One value a user can set: `is_list` several times, `is_flag` without a value on the command line."""

    name: str  # as in --name
    kind: Kind
    help: str
    default: Any = None
    default_text: str = ""  # for --help, where `default` does not say it
    is_list: bool = False
    is_flag: bool = False
    env_prefix: str = "FUSIONSERVE_"

    @property
    def flag(self) -> str:
        """The command line's name for it."""
        return f"--{self.name}"

    @property
    def env(self) -> str:
        """The environment's name for it."""
        return self.env_prefix + self.name.upper().replace("-", "_")

    def describe(self) -> str:
        """The help text with default and environment variable."""
        return f"{self.explain()} [env: {self.env}]"

    def explain(self) -> str:
        """The help text with the default."""
        default = self.default_text
        if not default and self.default is not None and not self.is_list:
            default = self.kind.show(self.default)
        repeats = "; may be repeated, in the environment separated by commas" if self.is_list else ""
        shown = f" (default: {default})" if default else ""
        return f"{self.help}{repeats}{shown}"

    def read(self, raw: object, source: str) -> Any:
        """The value of `raw`. Raises UsageError that names the source."""
        try:
            if self.is_list:
                return tuple(self.kind.parse(_text(item)) for item in _items(raw))
            return self.kind.parse(_text(raw))
        except ValueError as error:
            raise UsageError(f"{source}: {error}") from None


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are UsageErrors of one line, and that does not hide what it cannot print."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def print_help(self, file: Any = None) -> None:
        """Prints it at once; argparse would not say, or say too late, that nobody reads it."""
        print(self.format_help(), end="", file=file, flush=True)


def config_setting(env_prefix: str = "FUSIONSERVE_") -> Setting:
    """The setting that names the configuration file."""
    text = "YAML file with these names as keys"
    return Setting(name="config", kind=setting_kinds.FILE, help=text, env_prefix=env_prefix)


def add_settings(parser: argparse._ActionsContainer, settings: Sequence[Setting]) -> None:
    """Adds a flag for each setting to a parser or a group of one; what they were given is read by `resolve`."""
    for setting in settings:
        help_text = setting.describe().replace("%", "%%")
        if setting.is_flag:
            parser.add_argument(setting.flag, action="store_const", const="on", help=help_text)
        else:
            action = "append" if setting.is_list else "store"
            parser.add_argument(setting.flag, action=action, metavar=setting.kind.metavar, help=help_text)


def resolve(
    settings: Sequence[Setting], arguments: argparse.Namespace, others: Sequence[Setting] = ()
) -> dict[str, Any]:
    """The value of every setting, by name. The configuration file may have `others`, too, which are left unread.

    Raises UsageError with a reason that names its source.
    """
    flags = {name.replace("_", "-"): value for name, value in vars(arguments).items()}
    configs = [setting for setting in settings if setting.name == "config"]
    path = _first(configs[0], flags, {}, "") if configs else None
    known = {setting.name for setting in (*settings, *others)} - {"config"}
    file = _read_file(path, known) if path else {}
    return {setting.name: _first(setting, flags, file, str(path)) for setting in settings}


def _first(setting: Setting, flags: Values, file: Values, path: str) -> Any:
    sources = (
        (setting.flag, flags.get(setting.name)),
        (setting.env, _from_environment(setting)),
        (f"{path}: {setting.name}", file.get(setting.name)),
    )
    for source, raw in sources:
        if raw is not None:
            return setting.read(raw, source)
    return setting.default


def _from_environment(setting: Setting) -> str | list[str] | None:
    """What the environment says; an empty variable says nothing. Raises UsageError for an empty item of a list."""
    text = os.environ.get(setting.env)
    if not text:
        return None
    if not setting.is_list:
        return text
    items = text.split(",")
    if "" in items:
        raise UsageError(f"{setting.env}: there is nothing before or after a comma of {text!r}")
    return items


def _read_file(path: Path, known: set[str]) -> dict[str, Any]:
    # A client without the server's dependencies has no YAML, and needs it for this only.
    yaml = importlib.import_module("yaml")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path}: not a mapping of setting names to values")
    _check_keys(path, content, known)
    return content


def _check_keys(path: Path, content: Mapping[object, object], known: set[str]) -> None:
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{path}: unknown key {str(key)!r}{hint}")


def _items(raw: object) -> list[Any]:
    """The items of a list setting; a configuration file may also have a mapping or a single value."""
    if isinstance(raw, dict):
        return [f"{name}={value}" for name, value in raw.items()]
    return raw if isinstance(raw, list) else [raw]


def _text(raw: object) -> str:
    """What one would have typed for a value of the configuration file."""
    if isinstance(raw, bool):
        return "on" if raw else "off"
    if isinstance(raw, str | int | float):
        return str(raw)
    raise ValueError(f"{raw!r} is not a single value")
