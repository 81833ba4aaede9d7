"""The gRPC API: generated message and service modules."""

from fusionserve.v1 import adapter_pb2, adapter_pb2_grpc, inference_pb2, inference_pb2_grpc

__all__ = ["adapter_pb2", "adapter_pb2_grpc", "inference_pb2", "inference_pb2_grpc"]
