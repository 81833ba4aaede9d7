"""The settings of one generation, by the client's option they fill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from fusionserve.client import GenerateOptions
from fusionserve.server import setting_kinds as kinds
from fusionserve.server.command_errors import UsageError
from fusionserve.server.setting_kinds import Kind, choice, integer
from fusionserve.server.settings import Setting, Values

ENV_PREFIX = "FUSIONSERVE_GENERATE_"
WEIGHT_DETAIL = choice("mean", "per_token", "per_module")
UINT32 = integer(0, 2**32 - 1)


def _setting(name: str, kind: Kind, text: str, **options: Any) -> dict[str, Setting]:
    setting = Setting(name=name, kind=kind, help=text, env_prefix=ENV_PREFIX, **options)
    return {name.replace("-", "_"): setting}


GENERATION_SETTINGS: Mapping[str, Setting] = {
    **_setting("adapter", kinds.NAME, "adapter to apply", default_text="the base model"),
    **_setting("scale", kinds.NUMBER, "what the adapter is multiplied with", default_text="1"),
    **_setting("blend", kinds.WEIGHTS, "adapters to add up, with their weights"),
    **_setting("fusion", kinds.NAME, "fusion to apply", default_text="the base model"),
    "excluded_members": Setting(
        name="exclude-member",
        kind=kinds.NAME,
        help="member that the fusion leaves out",
        is_list=True,
        env_prefix=ENV_PREFIX,
    ),
    **_setting("fusion-weights", WEIGHT_DETAIL, "report how the fusion weighed its members"),
    **_setting("temperature", kinds.NUMBER, "divides the logits; 0 is greedy", default_text="1"),
    **_setting("top-k", UINT32, "keep the k most likely tokens", default_text="all"),
    **_setting("top-p", kinds.NUMBER, "keep the tokens that sum to this probability", default_text="1"),
    **_setting("min-p", kinds.NUMBER, "drop tokens less likely than this part of the best", default_text="0"),
    **_setting("repetition-penalty", kinds.NUMBER, "against tokens seen before", default_text="1"),
    **_setting("presence-penalty", kinds.NUMBER, "against tokens in the output", default_text="0"),
    **_setting("frequency-penalty", kinds.NUMBER, "the same, times their number", default_text="0"),
    **_setting("seed", integer(-(2**63), 2**63 - 1), "makes the text repeatable", default_text="a fresh one"),
    **_setting("max-new-tokens", UINT32, "most tokens to generate", default_text="the server's"),
    **_setting("min-new-tokens", UINT32, "fewest tokens to generate", default_text="0"),
    **_setting("stop", kinds.TEXT, "text that ends the generation", is_list=True),
    **_setting("ignore-eos", kinds.SWITCH, "go on after the end of sequence", is_flag=True),
    "time_limit_s": Setting(
        name="time-limit",
        kind=kinds.TIME_LIMIT,
        help="end after this time with the text so far; --timeout ends with an error",
        env_prefix=ENV_PREFIX,
    ),
    **_setting("cache-salt", kinds.TEXT, "share cached prompts with requests of the same salt only"),
    **_setting(
        "priority", integer(-1000, 1000), "place in the server's queue; greater is first", default_text="0"
    ),
}


def to_options(values: Values) -> GenerateOptions:
    """The client's options; what was not set is left to the server. Raises UsageError if they contradict."""
    options = {option: values[setting.name] for option, setting in GENERATION_SETTINGS.items()}
    if sum(options[name] is not None for name in ("adapter", "blend", "fusion")) > 1:
        raise UsageError("--adapter, --blend and --fusion exclude each other")
    if options["scale"] is not None and options["adapter"] is None:
        raise UsageError("--scale needs --adapter")
    for flag, option in (("--exclude-member", "excluded_members"), ("--fusion-weights", "fusion_weights")):
        if options[option] and options["fusion"] is None:
            raise UsageError(f"{flag} needs --fusion")
    return cast(GenerateOptions, options)
