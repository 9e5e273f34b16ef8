"""Sessions of onnxruntime on the CPU, from the content of an ONNX file: what was hashed is what runs."""

from __future__ import annotations

import os

import onnxruntime

CPU = "CPUExecutionProvider"

# Where onnxruntime looks for weights that an ONNX file keeps in other files: nowhere, as no hash covers them. Without
# this it would look in the working folder.
NO_EXTERNAL_DATA = ("session.model_external_initializers_file_folder_path", os.devnull)


def open_session(content: bytes, options: onnxruntime.SessionOptions | None = None) -> onnxruntime.InferenceSession:
    """Return a session for an ONNX file; errors are those of onnxruntime, which have no common base below Exception."""
    options = options or onnxruntime.SessionOptions()
    options.add_session_config_entry(*NO_EXTERNAL_DATA)
    session = onnxruntime.InferenceSession(content, options, providers=[CPU])
    session._model_bytes = None  # which onnxruntime keeps as long as the session, for a fallback to another provider
    return session
