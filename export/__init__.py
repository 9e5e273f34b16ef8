"""From a trained Keras model to a model version: its conversions, and the proof that they compute the same."""
