"""Tests of the results of `resnet load`."""
