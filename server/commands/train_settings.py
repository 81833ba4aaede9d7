"""Every setting of `fusionserve train`, by the configuration field it fills."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusionserve.artifact_folders import ADAPTER_CONFIG, find_by_name
from fusionserve.config import EMBEDDED_ADAPTERS
from fusionserve.limits import is_name
from fusionserve.server import setting_kinds as kinds
from fusionserve.server.command_errors import UsageError
from fusionserve.server.setting_kinds import Kind, choice, integer
from fusionserve.server.settings import Setting, Values, config_setting
from fusionserve.training_config import AdapterRun, DataConfig, FusionRun, OptimizationConfig

ENV_PREFIX = "FUSIONSERVE_TRAIN_"
ADAPTER_LEARNING_RATE = 2e-4
FUSION_LEARNING_RATE = 1e-3

Fields = Mapping[str, Setting]  # by the field of the configuration


def number(low: float, high: float) -> Kind:
    """Numbers from `low` to `high`."""

    def parse(text: str) -> float:
        value = kinds.parse_number(text)
        if not low <= value <= high:
            raise ValueError(f"{value:g} is not from {low:g} to {high:g}")
        return value

    return Kind("X", parse, "{:g}".format)


def parse_file(text: str) -> Path:
    """A file that exists."""
    path = kinds.parse_path(text)
    if not path.is_file():
        raise ValueError(f"there is no file {text!r}")
    return path


def parse_new_folder(text: str) -> Path:
    """A folder that need not exist, with a name."""
    path = kinds.parse_path(text)
    return path if path.name not in ("", "..") else path.resolve()


def parse_member(text: str) -> tuple[str, Path | None]:
    """NAME=PATH of an adapter, or the NAME of one in an adapter folder."""
    if "=" in text:
        return kinds.parse_adapter(text)
    if not is_name(text):
        raise ValueError(f"{text!r} is neither NAME=PATH nor a name")
    return text, None


DATA_FILE = Kind("FILE", parse_file)
NEW_FOLDER = Kind("DIR", parse_new_folder)
MEMBER = Kind("NAME[=PATH]", parse_member)
SHARE = number(0, 0.9)
PENALTY = number(0, 1e6)


def _setting(config: type, field: str, name: str, kind: Kind, text: str, default_text: str = "") -> Fields:
    """A setting whose default is the configuration's."""
    default = {item.name: item.default for item in dataclasses.fields(config)}[field]
    if default is dataclasses.MISSING:
        default = None
    setting = Setting(
        name=name,
        kind=kind,
        help=text,
        default=default,
        default_text=default_text,
        is_list=isinstance(default, tuple),
        env_prefix=ENV_PREFIX,
    )
    return {field: setting}


def _flag(field: str, name: str, text: str) -> Fields:
    return {
        field: Setting(
            name=name, kind=kinds.SWITCH, help=text, default=False, is_flag=True, env_prefix=ENV_PREFIX
        )
    }


DATA_SETTINGS: Fields = {
    **_setting(
        DataConfig, "train", "data", DATA_FILE, "file to learn from: JSON Lines, or .txt with documents"
    ),
    **_setting(
        DataConfig,
        "held_out",
        "held-out",
        DATA_FILE,
        "file to judge by (default: a share of the examples)",
    ),
    **_setting(
        DataConfig, "held_out_share", "held-out-share", SHARE, "share of the examples to judge by; 0 for none"
    ),
    **_setting(
        DataConfig, "max_examples", "max-examples", integer(1), "examples drawn from each data file", "all"
    ),
    **_setting(DataConfig, "max_tokens", "max-tokens", integer(2), "tokens in a row"),
    **_setting(DataConfig, "packing", "packing", kinds.SWITCH, "put several examples into a row, kept apart"),
    **_setting(
        DataConfig,
        "template",
        "template",
        Kind("auto|plain|alpaca|FILE", str),
        "how instruction and input become a prompt; a JSON file has prompt_no_input and prompt_input",
    ),
}

OPTIMIZATION_SETTINGS: Fields = {
    **_setting(
        OptimizationConfig, "steps", "steps", integer(1), "optimizer steps", "as many as the epochs take"
    ),
    **_setting(OptimizationConfig, "epochs", "epochs", number(0.001, 1e6), "times to read the data"),
    **_setting(OptimizationConfig, "batch_rows", "batch-rows", integer(1), "rows computed at once"),
    **_setting(OptimizationConfig, "accumulation", "accumulation", integer(1), "batches in one step"),
    **_setting(
        OptimizationConfig,
        "schedule",
        "schedule",
        choice("linear", "cosine", "constant"),
        "learning rate after the warm-up",
    ),
    **_setting(OptimizationConfig, "warmup_share", "warmup-share", SHARE, "share of the steps to warm up"),
    **_setting(
        OptimizationConfig, "weight_decay", "weight-decay", number(0, 10), "AdamW's weight decay, of matrices"
    ),
    **_setting(
        OptimizationConfig, "max_grad_norm", "max-grad-norm", number(0, 1e6), "longest gradient; 0 for any"
    ),
    **_setting(OptimizationConfig, "bf16", "bf16", kinds.SWITCH, "compute products in bfloat16"),
    **_setting(
        OptimizationConfig,
        "eval_steps",
        "eval-steps",
        integer(1),
        "steps between evaluations, each with a checkpoint",
        "a tenth of all",
    ),
    **_setting(
        OptimizationConfig,
        "patience",
        "patience",
        integer(1),
        "evaluations without a better loss before training stops",
        "never stop early",
    ),
    **_setting(OptimizationConfig, "seed", "seed", integer(0), "seed of weights, split and order"),
}

RUN_SETTINGS: Fields = {
    **_setting(
        AdapterRun, "model", "model", kinds.MODEL, "base model: a folder or a hub id", "the embedded model"
    ),
    **_setting(
        AdapterRun,
        "dtype",
        "dtype",
        choice("auto", "float32", "bfloat16"),
        "type of the base weights; auto: the checkpoint's, bfloat16 for float16",
    ),
    **_setting(AdapterRun, "out", "out", NEW_FOLDER, "folder to write, replaced if it is an artifact"),
    **_setting(AdapterRun, "work_dir", "work-dir", NEW_FOLDER, "folder for checkpoints", "OUT.work"),
    **_flag("resume", "resume", "go on from the last complete checkpoint"),
    **_flag("keep_checkpoints", "keep-checkpoints", "leave the checkpoints when the run is done"),
}

ADAPTER_SETTINGS: Fields = {
    **_setting(AdapterRun, "rank", "rank", integer(1, 4096), "LoRA rank"),
    **_setting(AdapterRun, "alpha", "alpha", number(1e-6, 1e6), "LoRA alpha", "twice the rank"),
    **_setting(AdapterRun, "dropout", "dropout", SHARE, "dropout on the adapter's input"),
    **_setting(
        AdapterRun,
        "target_modules",
        "target-module",
        kinds.NAME,
        "last name of the modules to adapt (default: every linear module of the layers)",
    ),
    **_setting(AdapterRun, "use_rslora", "rslora", kinds.SWITCH, "scale by alpha / sqrt(rank)"),
    **_setting(AdapterRun, "quantize", "quantize", choice("none", "nf4"), "base weights: nf4 makes it QLoRA"),
}

FUSION_SETTINGS: Fields = {
    **_setting(FusionRun, "name", "name", kinds.NAME, "the fusion's name", "the name of the folder"),
    **_setting(
        FusionRun,
        "modules",
        "module",
        kinds.NAME,
        "last name or pattern of modules to act on (default: all that a member adapts)",
    ),
    **_setting(
        FusionRun, "scope", "scope", choice("layer", "module"), "an attention per layer or per module"
    ),
    **_setting(FusionRun, "d_key", "d-key", integer(1, 4096), "width of keys and queries"),
    **_setting(FusionRun, "member_keys", "member-keys", kinds.SWITCH, "learn a key vector per member"),
    **_setting(FusionRun, "value", "value", choice("none", "diagonal", "low_rank"), "what V is"),
    **_setting(FusionRun, "value_rank", "value-rank", integer(1, 4096), "rank of V - I for low_rank"),
    **_setting(FusionRun, "value_penalty", "value-penalty", PENALTY, "pull of every V towards the identity"),
    **_setting(FusionRun, "temperature", "temperature", number(1e-3, 1e6), "divides the scores"),
    **_setting(FusionRun, "base_member", "base-member", kinds.SWITCH, "let a token choose no adapter"),
    **_setting(FusionRun, "score_dropout", "score-dropout", SHARE, "dropout on the raw scores"),
    **_setting(FusionRun, "entropy_penalty", "entropy-penalty", PENALTY, "pull towards sharp choices"),
    **_setting(
        FusionRun, "balance_penalty", "balance-penalty", PENALTY, "pull towards even use of the members"
    ),
    **_setting(
        FusionRun,
        "allow_base_mismatch",
        "allow-base-mismatch",
        kinds.SWITCH,
        "take members that name another base model",
    ),
}

MEMBERS = Setting(
    name="member",
    kind=MEMBER,
    help="adapter to weigh, by its path or its name in an adapter folder",
    default=(),
    is_list=True,
    env_prefix=ENV_PREFIX,
)
ADAPTER_DIRS = Setting(
    name="adapter-dir",
    kind=kinds.FOLDER,
    help="folder in which members are found by name (default: the embedded adapters)",
    default=(),
    is_list=True,
    env_prefix=ENV_PREFIX,
)


def _learning_rate(default: float) -> Fields:
    text = "learning rate after the warm-up"
    kind = number(1e-9, 10)
    return {
        "learning_rate": Setting(
            name="learning-rate", kind=kind, help=text, default=default, env_prefix=ENV_PREFIX
        )
    }


def _all(learning_rate: float, fields: Fields, *more: Setting) -> tuple[Setting, ...]:
    parts = (DATA_SETTINGS, fields, _learning_rate(learning_rate), OPTIMIZATION_SETTINGS, RUN_SETTINGS)
    return (*more, *(setting for part in parts for setting in part.values()), config_setting(ENV_PREFIX))


ALL_ADAPTER_SETTINGS = _all(ADAPTER_LEARNING_RATE, ADAPTER_SETTINGS)
ALL_FUSION_SETTINGS = _all(FUSION_LEARNING_RATE, FUSION_SETTINGS, MEMBERS, ADAPTER_DIRS)


def to_adapter_run(values: Values) -> AdapterRun:
    """The run of stage 1. Raises UsageError if something it cannot do without is missing."""
    return AdapterRun(**_shared(values), **_fields(values, ADAPTER_SETTINGS))


def to_fusion_run(values: Values) -> FusionRun:
    """The run of stage 2. Raises UsageError if something it cannot do without is missing."""
    if not values["member"]:
        raise UsageError("--member is missing: a fusion needs adapters to weigh")
    folders = values["adapter-dir"] or (EMBEDDED_ADAPTERS,)
    members = tuple(_find(name, path, folders) for name, path in values["member"])
    fields = _fields(values, FUSION_SETTINGS)
    fields["name"] = fields["name"] or Path(values["out"] or "").name
    return FusionRun(**_shared(values), **fields, members=members)


def _shared(values: Values) -> dict[str, Any]:
    for name in ("data", "out"):
        if not values[name]:
            raise UsageError(f"--{name} is missing")
    optimization = {**OPTIMIZATION_SETTINGS, **_learning_rate(0)}
    return {
        **_fields(values, RUN_SETTINGS),
        "data": DataConfig(**_fields(values, DATA_SETTINGS)),
        "optimization": OptimizationConfig(**_fields(values, optimization)),
    }


def _fields(values: Values, settings: Fields) -> dict[str, Any]:
    return {field: values[setting.name] for field, setting in settings.items()}


def _find(name: str, path: Path | None, folders: tuple[Path, ...]) -> tuple[str, Path]:
    if path is not None:
        return name, path
    found = find_by_name(name, folders, ADAPTER_CONFIG)
    if found is None:
        raise UsageError(f"--member: there is no adapter {name!r} in the adapter folders")
    return name, found
