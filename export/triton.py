"""config.pbtxt and labels.txt: the configuration of a model for Triton, beside its versions.

The fields are those of Triton's `model_config.proto`: https://github.com/triton-inference-server/common.
"""

from __future__ import annotations

import json
from pathlib import Path

from export.manifest import Manifest
from resnet import BadInput

CONFIG, LABELS = "config.pbtxt", "labels.txt"
MAX_BATCH = 64  # the largest batch size of the certificate
TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32"}


def config(manifest: Manifest) -> str:
    """Return the text of config.pbtxt for a model whose latest version has this manifest."""
    image, probabilities = manifest.input, manifest.output
    return f"""\
name: {json.dumps(manifest.model)}
backend: "onnxruntime"
default_model_filename: "model.onnx"
max_batch_size: {MAX_BATCH}
input {{
  name: {json.dumps(image.name)}
  data_type: {TYPES[image.dtype]}
  dims: {image.shape[1:]}
}}
output {{
  name: {json.dumps(probabilities.name)}
  data_type: {TYPES[probabilities.dtype]}
  dims: {probabilities.shape[1:]}
  label_filename: "{LABELS}"
}}
# As in `resnet serve`, all waiting requests form the next batch: no queue delay.
dynamic_batching {{
}}
instance_group {{
  kind: KIND_AUTO
  count: 1
}}
version_policy {{
  latest {{
    num_versions: 1
  }}
}}
"""


def write_files(manifest: Manifest, model: Path) -> None:
    """Write config.pbtxt and labels.txt beside the versions of a model; existing files must have the same content.

    Raises:
        BadInput: The other versions have another input or other classes: clients could not tell them apart.
    """
    contents = {CONFIG: config(manifest), LABELS: "".join(f"{label}\n" for label in manifest.labels)}
    for name, text in contents.items():
        path = model / name
        if not path.exists():
            part = path.with_name(f".{name}.part")
            part.write_text(text, "utf-8")
            part.replace(path)
        elif path.read_text("utf-8") != text:
            raise BadInput(
                f"{path} describes a model with another input or other classes than this one; "
                "export under another name, or remove that file if nobody uses the older versions"
            )
