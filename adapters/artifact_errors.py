"""How the loaders of untrusted files say no: fixed texts, and names from the file quoted and cut short."""

from __future__ import annotations

from fusionserve.errors import ArtifactError

MAX_QUOTED_LENGTH = 120


def quoted(text: str) -> str:
    """`text` in quotes, printable ASCII only and at most MAX_QUOTED_LENGTH characters of it."""
    shown = text if len(text) <= MAX_QUOTED_LENGTH else text[:MAX_QUOTED_LENGTH] + "..."
    return ascii(shown)


def unsupported(feature: str) -> ArtifactError:
    """The adapter uses something this server does not serve."""
    return ArtifactError(f"this adapter cannot be served: {feature}", reason="ADAPTER_UNSUPPORTED")


def bad_tensor(reason: str, tensor_name: str, problem: str) -> ArtifactError:
    """The tensor `tensor_name` of the weights file breaks the rule `reason`."""
    name = quoted(tensor_name)
    return ArtifactError(f"tensor {name}: {problem}", reason=reason, metadata={"tensor": name[1:-1]})
