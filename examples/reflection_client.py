"""A stranger's client with no .proto at hand: grpc-requests learns the API by reflection. Usage: ... [HOST:PORT]"""

from __future__ import annotations

import sys

from grpc_requests import Client


def main(target: str) -> None:
    """Lists the services and adapters, then streams one generation."""
    client = Client.get_by_endpoint(target)
    print("services:", ", ".join(client.service_names))
    for adapter in client.request("fusionserve.v1.AdapterService", "ListAdapters", {})["adapters"]:
        print(f"{adapter['name']:10} {adapter['state']}")
    request = {
        "text": "sub new {",
        "adapter": {"name": "perl"},
        "sampling": {"temperature": 0.7, "seed": 3},
        "stopping": {"max_new_tokens": 40},
    }
    for event in client.request("fusionserve.v1.InferenceService", "StreamGenerate", {"request": request}):
        if "chunk" in event:
            print(event["chunk"].get("text", ""), end="", flush=True)
        elif "finished" in event:
            print("\n" + event["finished"]["candidates"][0]["finish_reason"])


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051")
