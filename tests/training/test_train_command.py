"""`fusionserve train`: what it is told becomes the run, and what is wrong is refused at once."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fusionserve.config import EMBEDDED_ADAPTERS
from fusionserve.server.command_errors import UsageError
from fusionserve.server.commands import train
from fusionserve.server.commands.train_settings import (
    ALL_ADAPTER_SETTINGS,
    ALL_FUSION_SETTINGS,
    to_adapter_run,
    to_fusion_run,
)
from fusionserve.server.main import main
from fusionserve.server.settings import resolve
from fusionserve.training_config import AdapterRun, DataConfig, FusionRun, OptimizationConfig

NAMES = sorted(path.name for path in EMBEDDED_ADAPTERS.iterdir())[:2]


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n')
    return str(path)


def values(stage: str, *argv: str) -> dict[str, Any]:
    arguments = train._parser().parse_args([stage, *argv])
    return resolve(train.STAGES[stage][1], arguments)


def test_without_flags_a_run_has_the_defaults(data: str, tmp_path: Path) -> None:
    run = to_adapter_run(values("adapter", "--data", data, "--out", str(tmp_path / "out")))
    assert run == AdapterRun(
        out=tmp_path / "out",
        data=DataConfig(train=(Path(data),)),
        optimization=OptimizationConfig(learning_rate=2e-4),
    )


def test_resume_is_asked_for_by_a_flag(data: str, tmp_path: Path) -> None:
    flags = ("--data", data, "--out", str(tmp_path / "out"))
    assert [to_adapter_run(values("adapter", *flags, *more)).resume for more in ((), ("--resume",))] == [
        False,
        True,
    ]


def test_members_are_found_by_name_or_path(data: str, tmp_path: Path) -> None:
    flags = (
        "--member",
        NAMES[0],
        "--member",
        f"another={EMBEDDED_ADAPTERS / NAMES[1]}",
        "--value",
        "diagonal",
    )
    run = to_fusion_run(values("fusion", "--data", data, "--out", str(tmp_path / "mix"), *flags))
    assert run == FusionRun(
        name="mix",
        out=tmp_path / "mix",
        members=((NAMES[0], EMBEDDED_ADAPTERS / NAMES[0]), ("another", EMBEDDED_ADAPTERS / NAMES[1])),
        value="diagonal",
        data=DataConfig(train=(Path(data),)),
        optimization=OptimizationConfig(learning_rate=1e-3),
    )


def test_every_option_of_a_run_can_be_set() -> None:
    """Each field of the configurations is filled by a setting; four are not for the command line."""
    for settings, config, given in (
        (ALL_ADAPTER_SETTINGS, AdapterRun, {"data", "optimization", "show_progress"}),
        (ALL_FUSION_SETTINGS, FusionRun, {"data", "optimization", "show_progress", "members", "notes"}),
    ):
        fields = {*config.__dataclass_fields__} - given
        fields |= {*DataConfig.__dataclass_fields__, *OptimizationConfig.__dataclass_fields__}
        assert len(settings) - 1 - 2 * (config is FusionRun) == len(fields)  # config; member, adapter-dir


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("adapter", "--out", "x"), "--data is missing"),
        (("adapter", "--data", "nowhere.jsonl", "--out", "x"), "there is no file 'nowhere.jsonl'"),
        (("adapter", "--rank", "0"), "0 is not from 1"),
        (("fusion", "--member", "nobody"), "there is no adapter 'nobody'"),
        (("fusion", "--out", "x"), "--member is missing"),
        (("fusion", "--learning-rate", "nan"), "not a finite number"),
        (("fusion", "--scope", "token"), "not one of layer, module"),
        (("adapter", "--dtype", "float16"), "'float16' is not one of auto, float32, bfloat16"),
        (("cook",), "invalid choice"),
    ],
)
def test_wrong_command_lines_are_refused_in_one_line(
    argv: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *argv]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_out_is_required(data: str) -> None:
    with pytest.raises(UsageError, match="--out is missing"):
        to_adapter_run(values("adapter", "--data", data))


def test_help_waits_for_no_torch() -> None:
    code = (
        "import sys; from fusionserve.server.main import main\n"
        "try: main(['train', 'fusion', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--member-keys" in done.stdout


def test_bad_data_ends_with_file_line_and_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n{"text": 1}\n')
    assert main(["train", "adapter", "--data", str(path), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"fusionserve: {path}:2: 'text' is not a text\n"
    assert not (tmp_path / "out").exists()
