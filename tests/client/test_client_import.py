"""The client is for machines without the server's dependencies."""

import subprocess
import sys

import pytest

import fusionserve.client

BLOCKED = ("torch", "transformers", "safetensors", "tokenizers", "yaml", "prometheus_client", "numpy", "peft")
BLOCKED += ("grpc_health", "grpc_reflection", "grpc_channelz")


def python(code: str) -> str:
    """What a fresh interpreter without the server's dependencies prints."""
    block = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED}))\n"
    command = [sys.executable, "-P", "-c", block + code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


def test_client_imports_without_the_servers_dependencies() -> None:
    show = "print(*sorted(name for name in sys.modules if name.startswith('fusionserve.')))"
    loaded = python(f"import fusionserve.client\n{show}").split()
    assert {name.split(".")[1] for name in loaded} == {"client", "v1"}


@pytest.mark.parametrize("command", ["generate", "chat", "adapters", "fusions", "token"])
def test_client_commands_run_without_the_servers_dependencies(command: str) -> None:
    code = f"from fusionserve.server.main import main\nmain(['{command}', '--help'])"
    try:
        shown = python(code)
    except subprocess.CalledProcessError as error:
        raise AssertionError(error.stderr) from error
    assert shown.startswith(f"usage: fusionserve {command} ")


@pytest.mark.parametrize(
    ("argv", "needed"),
    [
        (
            ["serve"],
            "prometheus_client is not installed; this command needs: pip install 'fusionserve[server]'",
        ),
        (
            ["generate", "--prompt", "a", "--config", "a.yaml"],
            "yaml is not installed; this command needs: pip install pyyaml",
        ),
    ],
)
def test_what_is_not_installed_is_said_in_one_line(argv: list[str], needed: str) -> None:
    code = f"from fusionserve.server.main import main\nsys.stderr = sys.stdout\nprint(main({argv}))"
    assert python(code) == f"fusionserve: {needed}\n1\n"


def test_all_names_exist_and_are_sorted() -> None:
    names = fusionserve.client.__all__
    assert all(hasattr(fusionserve.client, name) for name in names)
    assert list(names) == sorted(names)
