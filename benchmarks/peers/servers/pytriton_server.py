"""Triton with its Python backend, run by pytriton."""

import os
import signal
import sys
import sysconfig

import numpy as np
from classifier import OnnxClassifier
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

_, path, port, name = sys.argv
classifier = OnnxClassifier(path)
# The backend loads the first libpython that the loader finds, which must be this interpreter's.
os.environ["LD_LIBRARY_PATH"] = sysconfig.get_config_var("LIBDIR")


@batch
def infer(image):
    return {"probabilities": classifier.classify(image)}


signal.signal(signal.SIGTERM, lambda *_: sys.exit())
config = TritonConfig(
    grpc_address="127.0.0.1", grpc_port=int(port), allow_http=False, allow_metrics=False, exit_timeout_secs=1
)
with Triton(config=config) as triton:
    triton.bind(
        model_name=name,
        infer_func=infer,
        inputs=[Tensor(name="image", dtype=np.float32, shape=classifier.shape)],
        outputs=[Tensor(name="probabilities", dtype=np.float32, shape=(classifier.classes,))],
        config=ModelConfig(max_batch_size=32, batcher=DynamicBatcher(max_queue_delay_microseconds=1000)),
    )
    triton.serve()
