"""Are 256 concurrent streams of all kinds served without an error? Asked of a server with the embedded model.

    python -P -m fusionserve.loadtest.many_streams

Serves with the default limits and runs a closed loop; prints the tables and fails if any request failed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fusionserve.loadtest import command
from fusionserve.loadtest.serving import serving
from fusionserve.loadtest_config import LoadConfig, UniformLengths


def main() -> None:
    """Serves, loads, prints, and fails where a request did."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--requests", type=int, default=768)
    parser.add_argument("--out", type=Path, help="folder for the report and the plots")
    arguments = parser.parse_args()
    with serving({}) as (target, _):
        config = LoadConfig(
            target=target,
            concurrency=arguments.streams,
            num_requests=arguments.requests,
            prompt_lengths=UniformLengths(16, 64),
            output_lengths=UniformLengths(8, 32),
        )
        report = command.run(config, arguments.out)
    if failings := command.failings(report):
        sys.exit(f"error: {failings}")


if __name__ == "__main__":
    main()
