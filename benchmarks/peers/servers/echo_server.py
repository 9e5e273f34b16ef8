"""No model: grpcio's synchronous server returns the bytes of the request, which shows the cost of a call alone."""

import sys
from concurrent.futures import ThreadPoolExecutor

import grpc

_, _, port, _ = sys.argv

echo = grpc.method_handlers_generic_handler(
    "inference.GRPCInferenceService",
    {"ModelInfer": grpc.unary_unary_rpc_method_handler(lambda request, _: request)},
)
server = grpc.server(ThreadPoolExecutor(32), handlers=[echo])
server.add_insecure_port(f"127.0.0.1:{port}")
server.start()
server.wait_for_termination()
