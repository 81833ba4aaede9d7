"""`fusionserve fusion`: looks into a fusion on disk, without a server."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from fusionserve.artifact_folders import FUSION_CONFIG, find_by_name
from fusionserve.config import EMBEDDED_ADAPTERS, EMBEDDED_FUSIONS
from fusionserve.errors import ArtifactError, InvalidRequestError
from fusionserve.inspection_request import InspectionRequest
from fusionserve.limits import is_name
from fusionserve.server import setting_kinds as kinds
from fusionserve.server.command_errors import CommandError, UsageError
from fusionserve.server.commands.train_settings import parse_file
from fusionserve.server.commands.training_extra import import_training
from fusionserve.server.setting_kinds import Kind, choice
from fusionserve.server.settings import CommandParser, Setting, Values, add_settings, config_setting, resolve

ENV_PREFIX = "FUSIONSERVE_INSPECT_"
PICTURE = ".png"


def parse_prompt(text: str) -> str:
    """A text that is not empty and can be encoded."""
    if not text:
        raise ValueError("it is empty")
    return kinds.parse_text(text)


def parse_picture(text: str) -> Path | str:
    """A file to write in a folder that exists, or off."""
    if text.strip().lower() == kinds.OFF:
        return kinds.OFF
    path = kinds.parse_path(text)
    if path.suffix.lower() != PICTURE:
        raise ValueError(f"{text!r} does not end in {PICTURE}")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{text!r} is a folder" if path.is_dir() else f"there is no folder {path.parent!s}")
    return path


def _setting(name: str, kind: Kind, text: str, default_text: str = "", **options: Any) -> Setting:
    return Setting(
        name=name, kind=kind, help=text, default_text=default_text, env_prefix=ENV_PREFIX, **options
    )


SETTINGS = (
    _setting("prompt", Kind("TEXT", parse_prompt), "text to read", "standard input", is_list=True),
    _setting("prompt-file", Kind("FILE", parse_file), "file with a text to read", default=(), is_list=True),
    _setting("member", kinds.ADAPTER, "where a member is", default=(), is_list=True),
    _setting(
        "adapter-dir",
        kinds.FOLDER,
        "folder in which members are found by name, before the shipped adapters",
        default=(),
        is_list=True,
    ),
    _setting(
        "fusion-dir",
        kinds.FOLDER,
        "folder in which NAME is found, before the shipped fusions",
        default=(),
        is_list=True,
    ),
    _setting("model", kinds.MODEL, "base model: a folder or a hub id", "the embedded model"),
    _setting(
        "dtype",
        choice("auto", "float32", "bfloat16", "float16"),
        "type of the base weights; auto: the checkpoint's, bfloat16 for float16",
        default="auto",
    ),
    _setting("allow-base-mismatch", kinds.SWITCH, "take members that name another base model", default=False),
    _setting("out", Kind("FILE.png|off", parse_picture), "picture to write", "fusion-NAME.png"),
    _setting("json", kinds.SWITCH, "print everything as JSON", default=False, is_flag=True),
    config_setting(ENV_PREFIX),
)


def main(argv: list[str]) -> int:
    """Checks every setting, reads the texts, and prints what the fusion attends to."""
    arguments = _parser().parse_args(argv)
    request = _to_request(arguments.fusion, resolve(SETTINGS, arguments))
    command = import_training("inspect_command")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a text may have what the terminal has not
    try:
        for text in command.run_inspection(request):
            print(text, flush=True)
    except InvalidRequestError as error:
        raise UsageError(error.message) from error
    except ArtifactError as error:
        raise CommandError(f"{error.reason}: {error.message}") from error
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="fusionserve fusion",
        description="Look into a fusion on disk. This needs no server: `fusionserve fusions` is about a server's.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    inspect = actions.add_parser(
        "inspect",
        help="show which members it attends to as it reads a text",
        description="Show which members a fusion attends to, token by token and layer by layer, as it reads a text.",
    )
    inspect.add_argument(
        "fusion", metavar="DIR|NAME", help="the fusion's folder, or the name of a shipped one"
    )
    add_settings(inspect, SETTINGS)
    return parser


def _to_request(fusion: str, values: Values) -> InspectionRequest:
    directory = _find_fusion(fusion, (*values["fusion-dir"], EMBEDDED_FUSIONS))
    return InspectionRequest(
        fusion=directory,
        prompts=_read_prompts(values),
        members=_named_once(values["member"]),
        adapter_dirs=(*values["adapter-dir"], EMBEDDED_ADAPTERS),
        model=values["model"],
        dtype=values["dtype"],
        allow_base_mismatch=values["allow-base-mismatch"],
        out=None if values["out"] == kinds.OFF else values["out"] or _picture_of(directory),
        as_json=values["json"],
    )


def _find_fusion(text: str, folders: tuple[Path, ...]) -> Path:
    """A folder is one wherever it is; a name counts only where no such folder is."""
    try:
        place = kinds.parse_path(text)
    except ValueError as error:
        raise UsageError(f"argument DIR|NAME: {error}") from None
    if (place / FUSION_CONFIG).is_file():
        return place
    found = find_by_name(text, folders, FUSION_CONFIG) if is_name(text) else None
    if found is not None:
        return found
    if place.is_dir():
        raise UsageError(f"{text!r} is not a fusion folder: it has no {FUSION_CONFIG}")
    names = sorted(path.parent.name for folder in folders for path in folder.glob(f"*/{FUSION_CONFIG}"))
    raise UsageError(f"there is no fusion {text!r}, neither a folder nor one of {', '.join(names)}")


def _picture_of(directory: Path) -> Path:
    return Path(f"fusion-{directory.resolve().name}{PICTURE}")


def _named_once(members: tuple[tuple[str, Path], ...]) -> tuple[tuple[str, Path], ...]:
    names = [name for name, _ in members]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--member: {name!r} is given twice")
    return members


def _read_prompts(values: Values) -> tuple[str, ...]:
    prompts = (*(values["prompt"] or ()), *map(_read_file, values["prompt-file"]))
    if prompts:
        return prompts
    if sys.stdin.isatty():
        raise UsageError("no prompt: give --prompt TEXT, --prompt-file FILE or pipe one to standard input")
    return (_check("standard input", sys.stdin.read()),)


def _read_file(path: Path) -> str:
    try:
        return _check(str(path), path.read_bytes().decode())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: it is not UTF-8") from None


def _check(source: str, text: str) -> str:
    try:
        return parse_prompt(text)
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from None
