"""What a GPU brings: proof, figures and training in one run of a few minutes; `python -m benchmarks.studies.gpu` starts it."""
