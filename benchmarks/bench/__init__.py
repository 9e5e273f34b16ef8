"""`resnet bench`: the Keras original and the exported variants of one model version, compared."""
