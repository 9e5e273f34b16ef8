"""Ray Serve behind its gRPC proxy, with its dynamic batching."""

import os
import signal
import sys
import tempfile

# The settings that its guide advises for throughput, except direct ingress, which bypasses the proxy.
os.environ |= {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}

import ray
from classifier import OnnxClassifier
from ray import serve
from ray.serve.config import gRPCOptions

from protos import inference_pb2 as pb

_, path, port, _ = sys.argv


@serve.deployment(max_ongoing_requests=1024)
class RayClassifier:
    def __init__(self):
        self._classifier = OnnxClassifier(path)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.002)
    async def _classify(self, requests):
        return self._classifier.classify_each(requests)

    async def ModelInfer(self, request):
        probabilities = await self._classify(self._classifier.unpack(request.raw_input_contents[0]))
        return pb.ModelInferResponse(raw_output_contents=[probabilities.tobytes()])


signal.signal(signal.SIGTERM, lambda *_: sys.exit())
ray.init(include_dashboard=False, logging_level="warning", _temp_dir=tempfile.gettempdir())
serve.start(
    http_options={"location": "HeadOnly", "host": "127.0.0.1", "port": 0},
    grpc_options=gRPCOptions(
        port=int(port),
        grpc_servicer_functions=["protos.inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server"],
    ),
)
serve.run(RayClassifier.bind())
signal.pause()
