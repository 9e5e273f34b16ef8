"""LitServe with its request queue on ZeroMQ; requests are JSON with pixels in base64."""

import base64
import sys

import litserve
from classifier import OnnxClassifier

_, path, port, _ = sys.argv


class LitServeClassifier(litserve.LitAPI):
    def setup(self, device):
        self._classifier = OnnxClassifier(path)

    def decode_request(self, request):
        return self._classifier.unpack(base64.b64decode(request["image"]))

    def batch(self, inputs):
        return inputs

    def predict(self, requests):
        return self._classifier.classify_each(requests)

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        return {"probabilities": output.tolist()}


if __name__ == "__main__":
    api = LitServeClassifier(max_batch_size=32, batch_timeout=0.002)
    server = litserve.LitServer(api, accelerator="cpu", fast_queue=True)
    server.run(host="127.0.0.1", port=int(port), log_level="warning", generate_client_file=False)
