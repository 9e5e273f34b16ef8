"""BentoML with a batchable method; requests are JSON with pixels in base64."""

import base64
import os
import signal
import sys
from pathlib import Path

os.environ["BENTOML_DO_NOT_TRACK"] = "True"

import bentoml
from classifier import OnnxClassifier

os.chdir(Path(__file__).parent)  # its workers import this file from the working directory


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class BentoMlClassifier:
    def __init__(self):
        self._classifier = OnnxClassifier(os.environ["MODEL"])

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=1000)
    def classify(self, images: list[str]) -> list[list[list[float]]]:
        requests = [self._classifier.unpack(base64.b64decode(image)) for image in images]
        return [probabilities.tolist() for probabilities in self._classifier.classify_each(requests)]


if __name__ == "__main__":
    _, path, port, _ = sys.argv
    os.environ["MODEL"] = path  # its workers have other arguments
    with BentoMlClassifier.serve_http(host="127.0.0.1", port=int(port)):
        signal.pause()
