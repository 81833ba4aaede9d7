"""adapter_config.json, read strictly: every feature is one we serve, one known to be harmless, or a refusal.

Nothing that the file names is imported or opened, and a key this version does not know is refused unless it
is off: an option that changes the forward pass and is ignored would serve wrong text without a sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fusionserve.adapters.artifact_directory import ArtifactDirectory
from fusionserve.adapters.artifact_errors import quoted, unsupported
from fusionserve.adapters.base_modules import short_model_name
from fusionserve.adapters.module_pattern import (
    ModulePattern,
    PatternError,
    compile_module_pattern,
    first_matches,
)
from fusionserve.adapters.strict_json import StrictJsonError, parse_json_object
from fusionserve.artifact_folders import ADAPTER_CONFIG
from fusionserve.errors import ArtifactError, UnavailableError

MAX_CONFIG_BYTES = 256 << 10  # for the two keys that EVA writes for each of some 900 modules, by full paths
MAX_RANK = 1 << 16
_CONFIG_DEPTH = 16
_DEFAULT_RANK = 8  # PEFT's, when the file has no such key
_DEFAULT_ALPHA = 8

# Options that say how the adapter was trained, placed or selected; the tensors say the rest.
_HARMLESS = frozenset(
    (
        "auto_mapping",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "merge_weights",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "unsloth_fixed",
    )
)
_READ = frozenset(
    (
        "alpha_pattern",
        "base_model_name_or_path",
        "bias",
        "fan_in_fan_out",
        "init_lora_weights",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "task_type",
        "use_dora",
        "use_rslora",
    )
)
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "arrow_config": "Arrow routing (arrow_config)",
    "enable_lora": "partly adapted projections (enable_lora)",
    "kasa_config": "KaSA (kasa_config), which changes the base weights",
    "layer_replication": "replicated layers (layer_replication)",
    "monteclora_config": "MonteCLoRA (monteclora_config), whose weights are sampled",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "trainable_token_indices": "trained token rows (trainable_token_indices)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "use_qalora": "QALoRA (use_qalora)",
    "velora_config": "VeLoRA (velora_config), which keeps training state among its weights",
}
_VARIANTS = {"arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "velora_config"}
# These leave the base weights alone, so a loaded adapter is a plain one. All others subtract from the base.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, slots=True, kw_only=True)
class PatternValues:
    """rank_pattern or alpha_pattern: keys in file order with their values."""

    patterns: tuple[ModulePattern, ...] = ()
    values: tuple[float, ...] = ()

    def resolve(self, paths: Iterable[str], default: float) -> dict[str, float]:
        """For each path the value of the first key that matches it, else `default`. Raises ArtifactError."""
        paths = tuple(paths)
        try:
            found = first_matches(self.patterns, paths)
        except PatternError as error:
            raise unsupported(f"rank_pattern or alpha_pattern: {error}") from None
        return {path: self.values[found[path]] if path in found else default for path in paths}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAConfig:
    """The part of the configuration that decides what is computed."""

    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    fan_in_fan_out: bool
    rank_pattern: PatternValues
    alpha_pattern: PatternValues
    modules_to_save: tuple[str, ...]
    ensure_weight_tying: bool
    init_lora_weights: str
    base_model_name: str  # as written, or empty

    def ranks(self, paths: Iterable[str]) -> dict[str, int]:
        """The rank PEFT gives each module."""
        return {path: int(rank) for path, rank in self.rank_pattern.resolve(paths, self.rank).items()}

    def scalings(self, paths: Iterable[str]) -> dict[str, float]:
        """s of each module: alpha / r, or alpha / sqrt(r) with rsLoRA, with the module's own alpha and r."""
        ranks = self.ranks(paths)
        alphas = self.alpha_pattern.resolve(ranks, self.alpha)
        if self.use_rslora:
            return {path: alphas[path] / math.sqrt(rank) for path, rank in ranks.items()}
        return {path: alphas[path] / rank for path, rank in ranks.items()}


def read_lora_config(directory: ArtifactDirectory) -> LoRAConfig:
    """Reads and checks the directory's configuration.

    Raises ArtifactError: CONFIG_MISSING, CONFIG_MALFORMED, ADAPTER_UNSUPPORTED, and what opening a file
    raises.
    """
    with directory.open_file(ADAPTER_CONFIG, missing_reason="CONFIG_MISSING") as file:
        try:
            data = file.read(MAX_CONFIG_BYTES + 1)
        except OSError:
            raise UnavailableError(
                "the configuration could not be read from storage", reason="STORAGE_UNAVAILABLE"
            ) from None
    return parse_lora_config(data or b"")


def parse_lora_config(data: bytes) -> LoRAConfig:
    """Checks the bytes of an adapter_config.json.

    Raises ArtifactError: CONFIG_MALFORMED, ADAPTER_UNSUPPORTED.
    """
    if len(data) > MAX_CONFIG_BYTES:
        raise _malformed(f"it is over {MAX_CONFIG_BYTES} bytes")
    try:
        fields = parse_json_object(data, max_depth=_CONFIG_DEPTH)
    except StrictJsonError as error:
        raise _malformed(str(error)) from None
    _check_type(fields)
    _check_options(fields)
    _check_init(fields.get("init_lora_weights", True))
    _check_choice_of_modules(fields)
    config = _to_config(fields)
    if config.use_dora and config.lora_bias:
        raise unsupported("DoRA with lora_bias")
    return config


def _check_choice_of_modules(fields: Mapping[str, object]) -> None:
    """Which modules are adapted is read off the tensors; what the file says of it must still make sense."""
    for key, kind in (("target_modules", str), ("exclude_modules", str), ("layers_to_transform", int)):
        value = fields.get(key)
        items = value if isinstance(value, list) else [value]
        if value is not None and not all(type(item) is kind for item in items):
            raise _malformed(f"{key} has the wrong type")


def check_base_model(config: LoRAConfig, model_names: Iterable[str]) -> None:
    """Raises ArtifactError (WRONG_BASE_MODEL) if the adapter names a base that is none of `model_names`.

    Only the last part of a name counts, in any case: the same base has many directories. Without a name on
    either side there is nothing to compare.
    """
    wanted = short_model_name(config.base_model_name)
    served = [name for name in map(short_model_name, model_names) if name]
    if not wanted or not served or wanted.casefold() in (name.casefold() for name in served):
        return
    raise ArtifactError(
        f"the adapter was trained on {quoted(wanted)}, this server serves {quoted(served[0])}",
        reason="WRONG_BASE_MODEL",
        metadata={"trained_on": quoted(wanted)[1:-1]},
    )


def _check_type(fields: Mapping[str, object]) -> None:
    if "peft_type" not in fields:
        raise unsupported(
            "its configuration has no peft_type, so it is not a PEFT adapter (AdapterHub's are not)"
        )
    peft_type = fields["peft_type"]
    if peft_type != "LORA":
        raise unsupported(f"peft_type {quoted(str(peft_type))}; only LORA is")
    task = fields.get("task_type")
    if task not in (None, "", "CAUSAL_LM"):
        raise unsupported(f"task_type {quoted(str(task))}; only CAUSAL_LM is")


def _check_options(fields: Mapping[str, object]) -> None:
    bias = fields.get("bias", "none")
    if bias not in ("none", None):
        raise unsupported(f"bias {quoted(str(bias))}, which changes the base model's own biases")
    for key, value in fields.items():
        if key in _READ or key in _HARMLESS or _is_off(key, value):
            continue
        raise unsupported(_REFUSED.get(key) or f"the option {quoted(key)} is not known to this version")


def _is_off(key: str, value: object) -> bool:
    if value == {} and key in _VARIANTS:  # PEFT takes it for a variant with all its defaults
        return False
    return value is None or value is False or value in ("", [], {})


def _check_init(init: object) -> None:
    if isinstance(init, bool) or init is None:
        return
    if isinstance(init, str) and init.lower() in (*_PLAIN_INITS, ""):
        return
    raise unsupported(
        f"init_lora_weights {quoted(str(init))} changes the base weights; save the adapter with "
        "path_initial_model_for_weight_conversion"
    )


def _to_config(fields: Mapping[str, object]) -> LoRAConfig:
    return LoRAConfig(
        rank=_to_rank("r", fields.get("r", _DEFAULT_RANK)),
        alpha=_to_number("lora_alpha", fields.get("lora_alpha", _DEFAULT_ALPHA)),
        use_rslora=_to_bool("use_rslora", fields.get("use_rslora")),
        use_dora=_to_bool("use_dora", fields.get("use_dora")),
        lora_bias=_to_bool("lora_bias", fields.get("lora_bias")),
        fan_in_fan_out=_to_bool("fan_in_fan_out", fields.get("fan_in_fan_out")),
        rank_pattern=_to_patterns("rank_pattern", fields.get("rank_pattern"), _to_rank),
        alpha_pattern=_to_patterns("alpha_pattern", fields.get("alpha_pattern"), _to_number),
        modules_to_save=_to_names("modules_to_save", fields.get("modules_to_save")),
        ensure_weight_tying=_to_bool("ensure_weight_tying", fields.get("ensure_weight_tying")),
        init_lora_weights=str(fields.get("init_lora_weights", True)).lower(),
        base_model_name=_to_text("base_model_name_or_path", fields.get("base_model_name_or_path")),
    )


def _to_rank(key: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise _malformed(f"{key} is not an integer from 1 to {MAX_RANK}")
    return value


def _to_number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e9:
        raise _malformed(f"{key} is not a number of at most 1e9")
    return float(value)


def _to_bool(key: str, value: object) -> bool:
    if value is not None and not isinstance(value, bool):
        raise _malformed(f"{key} is neither true nor false")
    return value is True


def _to_text(key: str, value: object) -> str:
    if value is not None and not isinstance(value, str):
        raise _malformed(f"{key} is not a string")
    return value or ""


def _to_patterns(key: str, value: object, to_value: Callable[[str, object], float]) -> PatternValues:
    if value is None:
        return PatternValues()
    if not isinstance(value, dict):
        raise _malformed(f"{key} is not a map")
    return PatternValues(
        patterns=tuple(_to_pattern(key, source) for source in value),
        values=tuple(to_value(f"a value of {key}", item) for item in value.values()),
    )


def _to_pattern(key: str, source: str) -> ModulePattern:
    try:
        return compile_module_pattern(source)
    except PatternError as error:
        raise unsupported(f"{key} {quoted(source)}: {error}") from None


def _to_names(key: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise _malformed(f"{key} is not a list of names")
    return tuple(value)


def _malformed(problem: str) -> ArtifactError:
    return ArtifactError(f"{ADAPTER_CONFIG} is wrong: {problem}", reason="CONFIG_MALFORMED")
