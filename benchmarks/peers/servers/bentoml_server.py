"""BentoML with a batchable method: pixels in base64 within JSON."""

import base64
import os
import signal
import sys
from pathlib import Path

os.environ["BENTOML_DO_NOT_TRACK"] = "True"

import bentoml
from classifier import Classifier

os.chdir(Path(__file__).parent)  # from where its workers import this file


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class Classify:
    def __init__(self):
        self._classifier = Classifier(os.environ["MODEL"])

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=1000)
    def classify(self, images: list[str]) -> list[list[list[float]]]:
        requests = [self._classifier.unpack(base64.b64decode(image)) for image in images]
        return [probabilities.tolist() for probabilities in self._classifier.classify_each(requests)]


if __name__ == "__main__":
    _, path, port, _ = sys.argv
    os.environ["MODEL"] = path  # its workers have arguments of their own
    with Classify.serve_http(host="127.0.0.1", port=int(port)):
        signal.pause()
