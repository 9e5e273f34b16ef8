"""mosec again; requests are PNG files over HTTP, each after its length in four bytes."""

import io
import struct

import numpy as np
from mosec import Server
from mosec_server import MosecClassifier
from PIL import Image


class MosecFiles(MosecClassifier):
    def deserialize(self, data):
        images, at = [], 0
        while at < len(data):
            (size,) = struct.unpack_from("<I", data, at)
            images.append(np.asarray(Image.open(io.BytesIO(data[at + 4 : at + 4 + size])).convert("RGB")))
            at += 4 + size
        return np.stack(images)


if __name__ == "__main__":
    server = Server()
    server.append_worker(MosecFiles, max_batch_size=32, max_wait_time=1)
    server.run()
