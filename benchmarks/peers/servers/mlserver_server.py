"""MLServer with a custom runtime and its adaptive batching."""

import asyncio
import sys

from classifier import OnnxClassifier
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse

_, path, port, name = sys.argv


class MlServerRuntime(MLModel):
    async def load(self):
        self._classifier = OnnxClassifier(path)
        return True

    async def predict(self, payload):
        pixels = NumpyCodec.decode_input(payload.inputs[0])
        # In a thread, so that the event loop reads requests meanwhile.
        probabilities = await asyncio.to_thread(self._classifier.classify, pixels)
        return InferenceResponse(
            model_name=self.name, outputs=[NumpyCodec.encode_output("probabilities", probabilities)]
        )


async def main():
    # No parallel workers: they serve several models or cores, and add a hop between processes.
    server = MLServer(
        Settings(
            host="127.0.0.1",
            http_port=0,
            grpc_port=int(port),
            parallel_workers=0,
            metrics_endpoint=None,
            debug=False,
        )
    )
    await server.start(
        [ModelSettings(name=name, implementation=MlServerRuntime, max_batch_size=32, max_batch_time=0.002)]
    )


asyncio.run(main())
