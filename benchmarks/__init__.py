"""Benchmarks: the load generator, comparisons with Keras and with other servers, and studies."""
