"""What adapter_config.json may say: read, harmless, refused or wrong."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from lora_files import make_config, write_adapter
from peft import LoraConfig as PeftConfig

from fusionserve.adapters.artifact_directory import open_directory
from fusionserve.adapters.lora_config import (
    MAX_CONFIG_BYTES,
    MAX_RANK,
    LoRAConfig,
    check_base_model,
    parse_lora_config,
    read_lora_config,
)
from fusionserve.errors import ArtifactError

PATH = "model.layers.0.self_attn.q_proj"


def parse(**changes: object) -> LoRAConfig:
    return parse_lora_config(json.dumps(make_config(**changes)).encode())


def refusal_of(data: bytes) -> ArtifactError:
    with pytest.raises(ArtifactError) as refusal:
        parse_lora_config(data)
    assert refusal.value.message.isascii() and refusal.value.message.isprintable()
    assert len(refusal.value.message) < 400
    return refusal.value


SCALINGS = {
    "plain": ({"r": 4, "lora_alpha": 6}, 4, 1.5),
    "float_alpha": ({"r": 4, "lora_alpha": 6.5}, 4, 1.625),
    "rslora": ({"r": 4, "lora_alpha": 6, "use_rslora": True}, 4, 3.0),
    "defaults": ({"r": 8}, 8, 0.5),
    "rank_pattern": ({"rank_pattern": {"q_proj": 16}}, 16, 0.25),
    "alpha_pattern": ({"alpha_pattern": {r"layers\.0\..*": 3}}, 2, 1.5),
    "both": ({"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 12, ".*": 99}}, 3, 4.0),
    "both_with_rslora": ({"rank_pattern": {"q_proj": 9}, "use_rslora": True}, 9, 4 / 3),
    "null_patterns": ({"rank_pattern": None, "alpha_pattern": None}, 2, 2.0),
    "no_match": ({"rank_pattern": {"proj": 3, "v_proj": 5}}, 2, 2.0),
    "zero_alpha": ({"lora_alpha": 0}, 2, 0.0),
}


@pytest.mark.parametrize(("changes", "rank", "scaling"), SCALINGS.values(), ids=SCALINGS)
def test_rank_and_scaling_of_a_module(changes: dict[str, object], rank: int, scaling: float) -> None:
    config = parse(**changes)
    assert config.ranks([PATH]) == {PATH: rank}
    assert math.isclose(config.scalings([PATH])[PATH], scaling)


def test_values_that_are_left_out_are_those_of_peft() -> None:
    config, peft = parse_lora_config(b'{"peft_type": "LORA"}'), PeftConfig()
    assert (config.rank, config.alpha) == (peft.r, peft.lora_alpha)


def test_largest_rank_and_longest_file_are_read() -> None:
    data = json.dumps(make_config(r=MAX_RANK)).encode()
    assert parse_lora_config(data.ljust(MAX_CONFIG_BYTES)).rank == MAX_RANK


HARMLESS = {
    "auto_mapping": {"base_model_class": "X", "parent_library": "os"},
    "corda_config": {"corda_method": "ipm"},
    "eva_config": {"rho": 2.0},
    "exclude_modules": ["up_proj"],
    "inference_mode": True,
    "layers_pattern": "layers",
    "layers_to_transform": [1, 2],
    "loftq_config": {"loftq_bits": 4},
    "lora_dropout": 0.1,
    "lora_ga_config": {"scale": "stable"},
    "megatron_config": {"tp": 2},
    "megatron_core": "megatron.core",
    "peft_version": "9.9",
    "qalora_group_size": 16,
    "revision": "main",
    "runtime_config": {"ephemeral_gpu_offload": True},
    "target_modules": "all-linear",
    "task_type": "",
    "unsloth_fixed": True,
    "from_next_year": None,
    "also_from_next_year": False,
    "and_this": [],
}


@pytest.mark.parametrize(("key", "value"), HARMLESS.items(), ids=HARMLESS)
def test_key_that_cannot_change_the_forward_is_accepted(key: str, value: object) -> None:
    assert parse(**{key: value}).rank == 2


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica", "EVA"])
def test_initialization_that_leaves_the_base_alone_is_accepted(init: object) -> None:
    assert parse(init_lora_weights=init).rank == 2


UNSUPPORTED = {
    "ia3": ({"peft_type": "IA3"}, "'IA3'"),
    "lowercase_type": ({"peft_type": "lora"}, "'lora'"),
    "type_is_a_list": ({"peft_type": ["LORA"]}, "LORA"),
    "task": ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
    "bias": ({"bias": "all"}, "bias 'all'"),
    "bias_lora_only": ({"bias": "lora_only"}, "'lora_only'"),
    "alora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "arrow": ({"arrow_config": {"top_k": 3}}, "arrow_config"),
    "kasa": ({"kasa_config": {"beta": 1}}, "kasa_config"),
    "kasa as it is": ({"kasa_config": {}}, "kasa_config"),
    "monteclora": ({"monteclora_config": {"num_samples": 2}}, "monteclora_config"),
    "velora": ({"velora_config": {"num_groups": 2}}, "velora_config"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "target_parameters": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
    "trainable_tokens": ({"trainable_token_indices": {"embed_tokens": [1]}}, "trainable_token_indices"),
    "enable_lora": ({"enable_lora": [True, False]}, "enable_lora"),
    "unknown_true": ({"use_magic": True}, "'use_magic'"),
    "unknown_number": ({"magic": 0}, "'magic'"),
    "dora_with_bias": ({"use_dora": True, "lora_bias": True}, "DoRA with lora_bias"),
    "lookahead": ({"rank_pattern": {"(?!v)q_proj": 2}}, "rank_pattern"),
    "broken_regex": ({"alpha_pattern": {"(q_proj": 2}}, "alpha_pattern"),
    **{
        init: ({"init_lora_weights": init}, init)
        for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "from_next_year")
    },
    "init_is_a_list": ({"init_lora_weights": [1]}, "init_lora_weights"),
}


@pytest.mark.parametrize(("changes", "named"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_feature_that_is_not_served_is_refused_by_name(changes: dict[str, object], named: str) -> None:
    error = refusal_of(json.dumps(make_config(**changes)).encode())
    assert (error.reason, named in error.message) == ("ADAPTER_UNSUPPORTED", True)


def test_adapterhub_config_is_refused_in_clear_words() -> None:
    error = refusal_of(
        json.dumps({"config": {"architecture": None}, "model_type": "bert", "version": "x"}).encode()
    )
    assert error.reason == "ADAPTER_UNSUPPORTED"
    assert "no peft_type" in error.message


def test_hostile_key_is_quoted_and_cut() -> None:
    error = refusal_of(json.dumps(make_config(**{"\x1b[31m\u202e/etc" + "x" * 9000: True})).encode())
    assert r"\x1b[31m\u202e" in error.message


MALFORMED = {
    "empty": b"",
    "not_json": b"{oops",
    "not_utf8": b'{"peft_type": "\xff"}',
    "list": b"[]",
    "trailing": b"{} {}",
    "same_key_twice": b'{"peft_type": "LORA", "r": 2, "r": 64}',
    "same_key_twice_inside": b'{"peft_type": "LORA", "rank_pattern": {"a": 1, "a": 2}}',
    "nan": b'{"peft_type": "LORA", "lora_alpha": NaN}',
    "infinity": b'{"peft_type": "LORA", "lora_alpha": -Infinity}',
    "overflowing_float": b'{"peft_type": "LORA", "lora_alpha": 1e999}',
    "thousands_of_digits": b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}",
    "depth_bomb": b'{"x":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "unclosed_depth_bomb": b"[" * 60_000,
    "too_long": b'{"peft_type": "LORA"}' + b" " * MAX_CONFIG_BYTES,
    **{
        f"{key}_{index}": json.dumps(make_config(**{key: value})).encode()
        for key, values in {
            "r": [0, -1, 1.5, "8", True, None, 1 << 40],
            "lora_alpha": ["16", True, None, 1e300, [1]],
            "use_rslora": ["true", 1],
            "use_dora": ["x"],
            "lora_bias": [1],
            "rank_pattern": [[], "x", {"a": 0}, {"a": True}, {"a": 1.5}],
            "alpha_pattern": [{"a": None}, {"a": "1"}],
            "modules_to_save": ["lm_head", [1], [""]],
            "target_modules": [5, ["q_proj", None]],
            "exclude_modules": [{}, [1]],
            "layers_to_transform": ["1", [True], 1.5],
            "base_model_name_or_path": [1, ["x"]],
        }.items()
        for index, value in enumerate(values)
    },
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_malformed_config_is_refused(data: bytes) -> None:
    assert refusal_of(data).reason == "CONFIG_MALFORMED"


def test_a_key_for_each_module_of_a_very_large_model_is_read() -> None:
    """As EVA writes them for a model of 405 B parameters, by full paths and indented as PEFT does."""
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    paths = [f"model.layers.{layer}.{name}" for layer in range(126) for name in names]
    wanted = {path: 1 + index % 32 for index, path in enumerate(paths)}
    alphas = {path: 16.000001 * rank for path, rank in wanted.items()}
    data = json.dumps(make_config(rank_pattern=wanted, alpha_pattern=alphas), indent=2).encode()
    assert len(data) > 80_000
    config = parse_lora_config(data)
    assert config.ranks(paths) == wanted
    assert config.scalings(paths) == pytest.approx(dict.fromkeys(paths, 16.000001))


def test_depth_inside_strings_does_not_count() -> None:
    assert parse(revision="[[[[{{{{" * 20 + '\\"').rank == 2


NAMES = [
    ("Qwen/Qwen2.5-0.5B", "Qwen2.5-0.5B"),
    ("qwen/QWEN2.5-0.5b", "/models/Qwen2.5-0.5B/"),
    ("C:\\models\\Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
    ("/cache/models--Qwen--Qwen2.5-0.5B/snapshots/0123abc", "Qwen/Qwen2.5-0.5B"),
    ("", "anything"),
    ("anything", ""),
]


@pytest.mark.parametrize(("trained_on", "served"), NAMES)
def test_same_base_under_another_path_is_accepted(trained_on: str, served: str) -> None:
    check_base_model(parse(base_model_name_or_path=trained_on), [served])


def test_any_name_of_the_base_will_do() -> None:
    check_base_model(parse(base_model_name_or_path="org/tiny"), ["alias", "", "/models/tiny"])


def test_wrong_base_is_refused_without_paths() -> None:
    config = parse(base_model_name_or_path="/home/me/secret/gemma-2b")
    with pytest.raises(ArtifactError, match=r"'gemma-2b'.*'llama'") as refusal:
        check_base_model(config, ["/srv/llama"])
    assert refusal.value.reason == "WRONG_BASE_MODEL"
    assert refusal.value.metadata == {"trained_on": "gemma-2b"}
    assert "secret" not in refusal.value.message and "srv" not in refusal.value.message


@pytest.mark.timeout(10)
def test_config_that_is_no_file_is_refused(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a")
    (directory / "adapter_config.json").unlink()
    assert read_reason(directory) == "CONFIG_MISSING"
    os.mkfifo(directory / "adapter_config.json")
    assert read_reason(directory) == "NOT_A_REGULAR_FILE"


def test_huge_config_is_refused_without_reading_it(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a")
    os.truncate(directory / "adapter_config.json", 1 << 40)
    assert read_reason(directory) == "CONFIG_MALFORMED"


def read_reason(directory: Path) -> str:
    with open_directory(directory) as opened, pytest.raises(ArtifactError) as refusal:
        read_lora_config(opened)
    return refusal.value.reason
