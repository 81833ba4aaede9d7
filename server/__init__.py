"""The gRPC server and the command line; nothing here imports torch."""
