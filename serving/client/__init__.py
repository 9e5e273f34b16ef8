"""Clients of `resnet.v1.Classifier`, for threads and for asyncio. Needs neither onnxruntime nor the server."""
