"""The Keras original behind grpc.aio, as it is often written: one `predict_on_batch` per call, without batching."""

import asyncio
import sys
from pathlib import Path

import grpc
import keras
import numpy as np

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceServicer, add_GRPCInferenceServiceServicer_to_server

_, path, port, _ = sys.argv


class KerasServicer(GRPCInferenceServiceServicer):
    def __init__(self, model):
        self._model = model

    async def ModelInfer(self, request, context):
        pixels = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(request.inputs[0].shape)
        probabilities = np.asarray(self._model.predict_on_batch(pixels.astype(np.uint8)))
        return pb.ModelInferResponse(raw_output_contents=[probabilities.tobytes()])


async def main():
    model = keras.models.load_model(Path(path).with_name("model.keras"), compile=False)
    server = grpc.aio.server()
    add_GRPCInferenceServiceServicer_to_server(KerasServicer(model), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


asyncio.run(main())
