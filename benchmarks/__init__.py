"""Benchmarks: the load generator, comparisons with Keras and with other servers, and studies."""

from resnet.cli import set_variables

set_variables()  # for those that are run as `python -m`
