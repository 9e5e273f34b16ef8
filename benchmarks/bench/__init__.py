"""`resnet bench`: every way to run one model version, side by side."""
