"""The engine on NVIDIA GPUs, alone or several as one, with CUDA or TensorRT."""
