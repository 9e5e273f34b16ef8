"""A model repository to answers over gRPC, and the clients that ask. Loads neither TensorFlow nor Keras."""
