"""Where a setting's value comes from, and what is said when it is wrong."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fusionserve.config import EMBEDDED_ADAPTERS, EMBEDDED_FUSIONS, EMBEDDED_MODEL, EngineConfig, ServerConfig
from fusionserve.server.command_errors import UsageError
from fusionserve.server.serve_settings import (
    ENGINE_SETTINGS,
    SERVE_SETTINGS,
    SERVER_SETTINGS,
    to_engine_config,
    to_server_config,
)
from fusionserve.server.setting_kinds import parse_seconds, parse_size, parse_weights, show_size
from fusionserve.server.settings import CommandParser, add_settings, resolve


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in SERVE_SETTINGS:
        monkeypatch.delenv(setting.env, raising=False)


def values(*argv: str) -> dict[str, Any]:
    """What `fusionserve serve` would work with."""
    parser = CommandParser(prog="serve")
    add_settings(parser, SERVE_SETTINGS)
    return resolve(SERVE_SETTINGS, parser.parse_args(argv))


def model_folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    return path


def adapter_folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text("{}")
    return path


def test_settings_cover_the_whole_configuration() -> None:
    assert ENGINE_SETTINGS.keys() == {field.name for field in dataclasses.fields(EngineConfig)}
    assert SERVER_SETTINGS.keys() == {field.name for field in dataclasses.fields(ServerConfig)}


def test_names_are_unique_and_shown_with_their_variables() -> None:
    names = [setting.name for setting in SERVE_SETTINGS]
    assert len(names) == len(set(names))
    parser = CommandParser(prog="serve")
    add_settings(parser, SERVE_SETTINGS)
    shown = parser.format_help().split()
    assert all(f"{setting.env}]" in shown for setting in SERVE_SETTINGS)


def test_defaults_are_the_configurations() -> None:
    embedded = EngineConfig(
        model=str(EMBEDDED_MODEL),
        model_name="fusionserve-tiny",
        adapter_dirs=(EMBEDDED_ADAPTERS,),
        fusion_dirs=(EMBEDDED_FUSIONS,),
    )
    assert to_engine_config(values()) == embedded
    assert to_server_config(values()) == ServerConfig()


def test_own_model_has_no_embedded_adapters(tmp_path: Path) -> None:
    config = to_engine_config(values("--model", str(model_folder(tmp_path / "base"))))
    assert (config.model, config.model_name, config.adapter_dirs) == (str(tmp_path / "base"), "base", ())
    assert config.fusion_dirs == ()


def test_hub_id_is_left_to_the_engine() -> None:
    config = to_engine_config(values("--model", "some-org/some-model"))
    assert (config.model, config.model_name) == ("some-org/some-model", "some-model")


def test_adapters_and_folders_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = adapter_folder(tmp_path / "one"), adapter_folder(tmp_path / "two")
    argv = ("--adapter", f"a={one}", "--adapter", f"b={two}", "--adapter-dir", str(tmp_path))
    config = to_engine_config(values(*argv))
    assert config.adapters == (("a", one), ("b", two))
    assert config.adapter_dirs == (tmp_path,)
    monkeypatch.setenv("FUSIONSERVE_ADAPTER", f"c={one},d={two}")
    assert to_engine_config(values()).adapters == (("c", one), ("d", two))


def test_flag_wins_over_environment_over_file_over_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "threads: 1\nblock-size: 32\nkv-cache-size: 1GiB\nprefix-cache: off\nlisten: localhost:1\n"
    )
    monkeypatch.setenv("FUSIONSERVE_CONFIG", str(file))
    monkeypatch.setenv("FUSIONSERVE_THREADS", "2")
    monkeypatch.setenv("FUSIONSERVE_BLOCK_SIZE", "64")
    found = values("--threads", "3")
    assert (found["threads"], found["block-size"], found["kv-cache-size"]) == (3, 64, 1 << 30)
    assert (found["prefix-cache"], found["listen"], found["drain-grace"]) == (False, "localhost:1", 30.0)


@pytest.mark.parametrize("name", ["base", "other"])
def test_reserved_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}' is a reserved name"):
        values("--adapter", f"{name}={adapter_folder(tmp_path / name)}")


def test_file_may_have_lists_and_mappings(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path / "one")
    file = tmp_path / "serve.yaml"
    file.write_text(f"adapter: {{a: {adapter}}}\nadapter-dir: [{tmp_path}, {adapter}]\nmodel: null\n")
    config = to_engine_config(values("--config", str(file)))
    assert config.adapters == (("a", adapter),)
    assert config.adapter_dirs == (tmp_path, adapter)
    assert config.model == str(EMBEDDED_MODEL)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("kv-cache: 1GiB", "unknown key 'kv-cache'; did you mean 'kv-cache-size'?"),
        ("threads: many", "threads: 'many' is not a whole number"),
        ("threads: [1, 2]", "threads: [1, 2] is not a single value"),
        ("- threads", "not a mapping of setting names to values"),
        ("a: b: c", "not YAML: mapping values are not allowed here"),
        ("config: other.yaml", "unknown key 'config'"),
    ],
)
def test_wrong_files_are_refused_with_key_and_source(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(content)
    with pytest.raises(UsageError) as caught:
        values("--config", str(file))
    assert str(caught.value).startswith(f"{file}: {reason}")


def test_missing_file_is_refused() -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml: No such file"):
        values("--config", "nowhere.yaml")


def test_wrong_environment_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSIONSERVE_KV_CACHE_SIZE", "lots")
    with pytest.raises(UsageError, match=r"^FUSIONSERVE_KV_CACHE_SIZE: 'lots' is not a size such as 512MiB$"):
        values()


@pytest.mark.parametrize(
    "argv",
    [
        ("--model", "/no/such/folder"),
        ("--model", "./nowhere"),
        ("--model", "."),
        ("--dtype", "int3"),
        ("--max-message-size", "1GiB"),  # gRPC takes no limit that twice this would fit in
        ("--max-message-size", "1"),
        ("--quantize", "int3"),
        ("--adapter-dir", "nowhere"),
        ("--adapter-dir", "~nobody-of-that-name/adapters"),
        ("--model", "~nobody-of-that-name/model"),
        ("--token-file", "~nobody-of-that-name/tokens.toml"),
        ("--config", "~nobody-of-that-name/serve.yaml"),
        ("--adapter", "no-path"),
        ("--adapter", "a=nowhere"),
        ("--adapter", "a=~nobody-of-that-name/a"),
        ("--adapter", "Bad Name=."),
        ("--adapter", "a=."),
        ("--listen", "50051"),
        ("--listen", "localhost:99999"),
        ("--threads", "0"),
        ("--threads", "1.5"),
        ("--drain-grace", "soon"),
        ("--drain-grace", "9" * 400),
        ("--keepalive-time", "600h"),
        ("--keepalive-timeout", "501h"),
        ("--step-timeout", f"{10**17}h"),
        ("--kv-cache-size", "9" * 400),
        ("--reflection", "maybe"),
        ("--log-level", "loud"),
        ("--thread", "1"),
        ("--threads",),
    ],
)
def test_wrong_flags_are_refused_in_one_line(
    argv: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        values(*argv)
    assert "\n" not in str(caught.value)
    assert argv[0] in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "text", "reason"),
    [
        ("--model", "", "the path is empty"),
        ("--adapter-dir", "", "the path is empty"),
        ("--fusion-dir", "", "the path is empty"),
        ("--tls-cert", "", "the path is empty"),
        ("--config", "", "the path is empty"),
        ("--adapter", "a=", "'a=' is not NAME=PATH"),
        ("--fusion", "a=", "'a=' is not NAME=PATH"),
    ],
)
def test_empty_path_is_not_the_working_directory(
    flag: str, text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_folder(adapter_folder(tmp_path))
    (tmp_path / "fusion_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"^{flag}: {reason}$"):
        values(flag, text)


@pytest.mark.parametrize("text", [".,", ",.", ".,,."])
def test_comma_with_nothing_beside_it_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSIONSERVE_ADAPTER_DIR", text)
    with pytest.raises(
        UsageError, match=r"^FUSIONSERVE_ADAPTER_DIR: there is nothing before or after a comma"
    ):
        values()


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("512MiB", 512 << 20), ("1.5 gib", 3 << 29), ("2GB", 2 * 10**9)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert parse_size(show_size(size)) == size


@pytest.mark.parametrize(
    ("text", "seconds"), [("30", 30), ("1.5s", 1.5), ("250ms", 0.25), ("10m", 600), ("500h", 1.8e6)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


def test_blend_weights() -> None:
    assert parse_weights("a=0.5, b=-1") == {"a": 0.5, "b": -1.0}
    for wrong in ("a", "=1", "a=x", "a=1,a=2", "a=nan"):
        with pytest.raises(ValueError, match=r"is not|twice"):
            parse_weights(wrong)


def test_shares_are_above_zero(tmp_path: Path) -> None:
    given = values(
        "--model", str(model_folder(tmp_path / "m")), "--fair-weights", "perl=2,fusion:domains=0.5"
    )
    assert to_engine_config(given).fair_weights == {"perl": 2.0, "fusion:domains": 0.5}
    for wrong in ("perl=0", "perl=-1", "perl", "perl=x", "perl=1,perl=2"):
        with pytest.raises(UsageError, match="--fair-weights"):
            values("--fair-weights", wrong)


def test_time_limits_are_some_time() -> None:
    for flag in ("--step-timeout", "--load-timeout", "--max-request-time"):
        with pytest.raises(UsageError, match="no time at all"):
            values(flag, "0s")
