"""`fusionserve adapters`."""

from __future__ import annotations

from fusionserve.client import Adapter
from fusionserve.server.commands.artifact_command import ArtifactCommand, to_size


def main(argv: list[str]) -> int:
    """Runs one action and prints the adapters it is about."""
    return COMMAND.run(argv)


def _row(adapter: Adapter) -> tuple[str, ...]:
    return (
        adapter.name,
        adapter.state,
        adapter.residency,
        str(adapter.version or "-"),
        str(adapter.max_rank or "-"),
        to_size(adapter.host_bytes),
        "yes" if adapter.pinned else "no",
        str(adapter.active_requests),
        ",".join(adapter.held_by_fusions) or "-",
        adapter.digest[:12] or "-",
    )


COMMAND = ArtifactCommand(
    noun="adapter",
    life=lambda client: client.adapters,
    headings=(
        *("NAME", "STATE", "RESIDENCY", "VERSION", "RANK", "SIZE", "PINNED", "ACTIVE", "FUSIONS"),
        "DIGEST",
    ),
    to_row=_row,
)
