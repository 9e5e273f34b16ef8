"""The study of a GPU, in one run of a few minutes: `python -m benchmarks.studies.gpu`."""
