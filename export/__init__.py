"""A trained Keras model to a verified model version: SavedModel, ONNX, and the proof that they compute the same."""
