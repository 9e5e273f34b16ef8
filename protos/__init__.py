"""The wire contracts, `classifier.proto` and `inference.proto`, and the code that `python -m protos.generate` makes.

Their descriptors live in a pool of their own. tritonclient registers other descriptors of the same names in protobuf's
default pool, and one process could not load both.
"""

from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
