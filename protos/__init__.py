"""The wire contracts as .proto files, and the code that `python -m protos.generate` generates from them.

`classifier.proto` is this project's own protocol. `inference.proto` is for clients of Triton and KServe,
`tensorflow_serving.proto` with `tensorflow.proto` for clients of TensorFlow Serving. `onnx.proto` is for files.
The descriptors live in a separate pool: those clients register the same names in protobuf's default pool, and one
process could not load both.
"""

from google.protobuf import any_pb2, wrappers_pb2
from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
for _file in (any_pb2, wrappers_pb2):  # imported by our .proto files
    POOL.AddSerializedFile(_file.DESCRIPTOR.serialized_pb)
