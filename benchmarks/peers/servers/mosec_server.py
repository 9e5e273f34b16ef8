"""mosec, whose front end is in Rust; requests are raw pixels over HTTP."""

import os
import sys

_, path, port, _ = sys.argv
os.environ |= {"MOSEC_ADDRESS": "127.0.0.1", "MOSEC_PORT": port, "MOSEC_LOG_LEVEL": "warning"}

from classifier import OnnxClassifier
from mosec import Server, Worker


class MosecClassifier(Worker):
    resp_mime_type = "application/octet-stream"

    def __init__(self):
        super().__init__()
        self._classifier = OnnxClassifier(path)

    def deserialize(self, data):
        return self._classifier.unpack(data)

    def forward(self, data):
        return self._classifier.classify_each(data)

    def serialize(self, data):
        return data.tobytes()


if __name__ == "__main__":
    server = Server()
    server.append_worker(MosecClassifier, max_batch_size=32, max_wait_time=1)
    server.run()
