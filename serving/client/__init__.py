"""Clients of `resnet.v1.Classifier`, for threads and for asyncio. They need neither onnxruntime nor the server."""

from serving.client.channel import Tls
from serving.client.client import DEFAULT_SERVER, AsyncClient, Client
from serving.client.stream import Result
from serving.client.types import Answer, Class, ImageInput, ImageInputs

__all__ = ["DEFAULT_SERVER", "Answer", "AsyncClient", "Class", "Client", "ImageInput", "ImageInputs", "Result", "Tls"]
