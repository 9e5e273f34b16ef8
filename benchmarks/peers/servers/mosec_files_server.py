"""mosec again; requests are PNG files over HTTP, each after its length in four bytes."""

import io
import os
import struct
import sys

_, path, port, _ = sys.argv
os.environ |= {"MOSEC_ADDRESS": "127.0.0.1", "MOSEC_PORT": port, "MOSEC_LOG_LEVEL": "warning"}

import numpy as np
from classifier import OnnxClassifier
from mosec import Server, Worker
from PIL import Image


class MosecFiles(Worker):
    resp_mime_type = "application/octet-stream"

    def __init__(self):
        super().__init__()
        self._classifier = OnnxClassifier(path)

    def deserialize(self, data):
        images, at = [], 0
        while at < len(data):
            (size,) = struct.unpack_from("<I", data, at)
            images.append(np.asarray(Image.open(io.BytesIO(data[at + 4 : at + 4 + size])).convert("RGB")))
            at += 4 + size
        return np.stack(images)

    def forward(self, data):
        return self._classifier.classify_each(data)

    def serialize(self, data):
        return data.tobytes()


if __name__ == "__main__":
    server = Server()
    server.append_worker(MosecFiles, max_batch_size=32, max_wait_time=1)
    server.run()
