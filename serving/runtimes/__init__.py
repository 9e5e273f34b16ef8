"""What computes a batch: onnxruntime, OpenVINO, CUDA, and the choice among them."""
