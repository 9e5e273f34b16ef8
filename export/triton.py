"""config.pbtxt and labels.txt: the configuration of a model for Triton, beside its versions.

The fields are those of Triton's `model_config.proto`: https://github.com/triton-inference-server/common.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from export import files, repository
from export.manifest import Manifest
from resnet import BadInput

CONFIG, LABELS = repository.RESERVED
# Triton looks for the library of a backend in the folders of the version and of the model before that of the backends:
# https://github.com/triton-inference-server/backend. With `config` it reads no other file beside the versions.
LIBRARIES = "libtriton_*.so"
MAX_BATCH = 64  # the largest batch size of the certificate
TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32"}


def config(manifest: Manifest) -> str:
    """Return the text of config.pbtxt for a model whose latest version has this manifest.

    Versions of an earlier text are refused as changed: another text needs another `export.manifest.FORMAT`.
    """
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
    """Write config.pbtxt and labels.txt beside the versions of a model, whose files must have the same content.

    Raises:
        BadInput: The other versions have another input or other classes: clients could not tell them apart.
    """
    for path, content in _list_files(manifest, model).items():
        if not path.exists() or not repository.versions(model):
            files.write(path, content)
        elif files.read(path) != content:
            raise BadInput(
                f"{path} describes a model with another input or other classes than this one; "
                "export under another name, or remove that file if nobody uses the older versions"
            )


def list_paths(model: Path) -> list[Path]:
    """Return the paths of all that Triton reads beside the versions of a model; some may be missing."""
    return [model / CONFIG, model / LABELS, *sorted(model.glob(LIBRARIES))]


def changed_files(manifest: Manifest, model: Path) -> Iterator[str]:
    """Yield a clause for each of the files that differs from what this version says, and for code that Triton loads.

    The files may be missing; other files are the user's own.
    """
    for path in sorted(model.glob(LIBRARIES)):
        yield f"{str(path)!r} is code that Triton would load, remove it"
    for path, content in _list_files(manifest, model).items():
        try:
            if files.read(path) != content:
                yield f"{path}, which Triton reads, is not the file that was exported with this version"
        except FileNotFoundError:
            continue
        except OSError as error:
            yield f"{path} cannot be read ({error.strerror})"


def _list_files(manifest: Manifest, model: Path) -> dict[Path, bytes]:
    """Return the content of each file, by its path."""
    return {model / CONFIG: config(manifest).encode(), model / LABELS: make_labels(manifest)}


def make_labels(manifest: Manifest) -> bytes:
    """Return the content of labels.txt."""
    return "".join(f"{label}\n" for label in manifest.labels).encode()
