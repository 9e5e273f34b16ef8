"""Images to a trained Keras ResNet: a run folder that holds the model, its history and its figures."""
