"""The wire contracts, .proto files, and the code that `python -m protos.generate` makes of them.

`classifier.proto` is our own; `inference.proto` is what clients of Triton and KServe speak, `tensorflow_serving.proto`
with `tensorflow.proto` those of TensorFlow Serving. The descriptors live in a pool of their own: those clients register
others of the same names in protobuf's default pool, and one process could not load both.
"""

from google.protobuf import any_pb2, wrappers_pb2
from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
for _file in (any_pb2, wrappers_pb2):  # what ours import
    POOL.AddSerializedFile(_file.DESCRIPTOR.serialized_pb)
