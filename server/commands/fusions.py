"""`fusionserve fusions`."""

from __future__ import annotations

from fusionserve.client import Fusion
from fusionserve.server.commands.artifact_command import ArtifactCommand, to_size


def main(argv: list[str]) -> int:
    """Runs one action and prints the fusions it is about."""
    return COMMAND.run(argv)


def _row(fusion: Fusion) -> tuple[str, ...]:
    return (
        fusion.name,
        fusion.state,
        fusion.residency,
        str(fusion.version or "-"),
        ",".join(member.name for member in fusion.members) or "-",
        fusion.scope or "-",
        str(fusion.pool_ranks or "-"),
        to_size(fusion.host_bytes),
        "yes" if fusion.pinned else "no",
        str(fusion.active_requests),
        fusion.digest[:12] or "-",
    )


COMMAND = ArtifactCommand(
    noun="fusion",
    life=lambda client: client.fusions,
    headings=(
        *("NAME", "STATE", "RESIDENCY", "VERSION", "MEMBERS", "SCOPE", "RANKS", "SIZE", "PINNED"),
        *("ACTIVE", "DIGEST"),
    ),
    to_row=_row,
)
