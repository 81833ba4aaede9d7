"""fusionserve: one frozen base model, per-request adapters, one batch, one gRPC server."""

__version__ = "0.1.0"

__all__ = ["__version__"]
