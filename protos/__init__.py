"""The wire contract: `classifier.proto`, and the code that `python -m protos.generate` makes from it."""
