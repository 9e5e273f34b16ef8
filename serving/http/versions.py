"""What a served version says of itself: its manifest with the certificate, and its held-out images."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
from PIL import Image

from export import reference
from export.manifest import OLD_SIGNATURE, SIGNATURE
from export.reference import Reference
from resnet import BadInput
from serving.errors import FailedPrecondition, NotFound
from serving.http.endpoint import FILE, Resource, RestRequest, RestResponse, to_json
from serving.models.model import Model
from serving.models.registry import ModelRegistry
from serving.models.watcher import Watcher
from serving.protocols.inputs import to_number, to_version

EXAMPLES = 24  # shown of a version
OPENED = 4  # files of held-out images that are kept in memory
BASE = "/models/{name}/versions/{version}"


class Example(msgspec.Struct):
    """A held-out image: its class, and what the Keras original answers."""

    index: int
    label: str
    answer: str
    probability: float


class Examples(msgspec.Struct):
    """Some held-out images, of each class in turn, and the one where the served variant differs most."""

    examples: list[Example]
    worst: Example | None


class VersionPages:
    """The resources of the served versions."""

    def __init__(self, models: ModelRegistry, repository: Watcher) -> None:
        """Describe `models`, whose files are in `repository`."""
        self._models, self._repository = models, repository
        self._opened: dict[str, Reference] = {}  # by digest; the last `OPENED`

    def list_resources(self) -> tuple[Resource, ...]:
        """Return the resources."""
        return (
            Resource(
                path=f"{BASE}/manifest",
                read=self._read_manifest,
                summary="Manifest of a version, with its parity certificate, and whether it is signed",
                response={"type": "object"},
            ),
            Resource(
                path=f"{BASE}/examples",
                read=self._list_examples,
                summary="Held-out images of a version, with the answers of the Keras original",
                response=Examples,
            ),
            Resource(
                path=f"{BASE}/examples/{{index}}",
                read=self._draw_example,
                summary="A held-out image",
                response=FILE,
                content_type="image/png",
            ),
        )

    def _find(self, request: RestRequest) -> Model:
        number = to_version(request.parameters["version"])
        if not number:
            raise NotFound(f"there is no version {request.parameters['version']!r}; versions are numbers")
        return self._models.find(request.parameters["name"], number)

    def _locate(self, model: Model) -> Path:
        folder, _ = self._repository.find_folder(model.name)
        return folder / str(model.version)

    def _load(self, model: Model) -> Reference:
        key = model.manifest.digest
        if (found := self._opened.get(key)) is None:
            try:
                found = reference.load(self._locate(model), model.manifest)
            except BadInput as error:
                raise FailedPrecondition(f"the held-out images cannot be read: {error}") from None
            self._opened = {**dict([*self._opened.items()][1 - OPENED :]), key: found}  # replaced, as threads share it
        return found

    def _read_manifest(self, request: RestRequest) -> RestResponse:
        model = self._find(request)
        folder = self._locate(model)
        signed = any((folder / name).exists() for name in (SIGNATURE, OLD_SIGNATURE))
        return to_json({"signed": signed, "manifest": model.manifest})

    def _list_examples(self, request: RestRequest) -> RestResponse:
        model = self._find(request)
        held = self._load(model)

        def describe(index: int) -> Example:
            labels, answer = model.manifest.labels, held.probabilities[index]
            best = int(answer.argmax())
            return Example(index, labels[held.labels[index]], labels[best], float(answer[best]))

        worst = _find_worst(model)
        return to_json(
            Examples(
                [describe(int(index)) for index in held.by_class[:EXAMPLES]],
                describe(worst) if worst is not None and worst < len(held.labels) else None,
            )
        )

    def _draw_example(self, request: RestRequest) -> RestResponse:
        images, given = self._load(self._find(request)).images, request.parameters["index"]
        index = to_number(given)
        if index is None or index >= len(images):
            raise NotFound(f"there is no held-out image {given!r}; their numbers are 0 to {len(images) - 1}")
        image = images[index]
        file = io.BytesIO()
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(file, "PNG")
        return RestResponse(file.getvalue(), "image/png")


def _find_worst(model: Model) -> int | None:
    """Return the held-out image where the served variant differs most, by its certificate; None if it never does."""
    name = "onnx" if model.precision == "fp32" else f"onnx-{model.precision}"
    variant = model.manifest.certificate.find(name)
    rows = [row for row in variant.rows if row.worst and row.max_difference] if variant else []
    return max(rows, key=lambda row: row.max_difference).worst[0] if rows else None
