"""config.pbtxt and labels.txt: what Triton wants to know of a model, beside its versions.

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
    taken, given = manifest.input, manifest.output
    return f"""\
name: {json.dumps(manifest.model)}
backend: "onnxruntime"
default_model_filename: "model.onnx"
max_batch_size: {MAX_BATCH}
input {{
  name: {json.dumps(taken.name)}
  data_type: {TYPES[taken.dtype]}
  dims: {taken.shape[1:]}
}}
output {{
  name: {json.dumps(given.name)}
  data_type: {TYPES[given.dtype]}
  dims: {given.shape[1:]}
  label_filename: "{LABELS}"
}}
# A batch is what waits when the engine becomes free, as in `resnet serve`: no queue delay.
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


def describe(manifest: Manifest, model: Path) -> None:
    """Write config.pbtxt and labels.txt beside the versions of a model, or check that they already say the same.

    Raises:
        BadInput: The versions that `model` holds have another input or other classes: a client could not tell them
            apart.
    """
    wanted = {CONFIG: config(manifest), LABELS: "".join(f"{label}\n" for label in manifest.labels)}
    for name, text in wanted.items():
        path = model / name
        if not path.exists():
            part = path.with_name(f".{name}.part")
            part.write_text(text, "utf-8")
            part.replace(path)
        elif path.read_text("utf-8") != text:
            raise BadInput(
                f"{path} describes a model with another input or other classes than this one; "
                "export it under a name of its own, or remove that file if nobody uses the older versions"
            )
