"""The load generator of all benchmarks, and `resnet load`, which puts any server under load with it."""
