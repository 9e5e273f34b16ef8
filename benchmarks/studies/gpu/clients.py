"""`resnet serve` on the device, called by an unmodified tritonclient; its answers are compared with those of Keras."""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from benchmarks.harness.process import serve
from benchmarks.studies.gpu.files import Results, describe, parse_args
from export import reference
from resnet import CheckFailed
from serving.transports import choice

TOLERANCE = {"fp32": 1e-5, "fp16": 2e-2}
IMAGES, ENDS = 256, (1, 8, 72)  # requests of 1, 7 and 64 images, and of all others


def main() -> None:
    """Check each version that is complete, on each transport and in each of its precisions."""
    args = parse_args(__doc__)
    results = Results(args)
    if not find_spec("tritonclient"):
        print("left out: tritonclient is not installed")
        sys.exit()
    for folder in args.folders:
        if (folder / reference.NAME).is_file() and (folder / "saved_model.pb").is_file():
            for transport in ("native", "grpcio") if not choice.find_problem() else ("grpcio",):
                for precision in TOLERANCE:
                    title = f"{folder.parent.name} in {precision} by tritonclient, {transport}"
                    results.attempt(title, partial(_check, folder, precision, transport, args.device, results))
    results.end()


def _check(folder: Path, precision: str, transport: str, device: str, results: Results) -> None:
    """Serve one version, if it has the precision, and compare what a client receives with the answers of Keras.

    Raises:
        CheckFailed: The answers differ.
    """
    import tritonclient.grpc as triton

    manifest = describe(folder / "model.onnx")
    if not manifest.certificate.find("onnx" if precision == "fp32" else f"onnx-{precision}"):
        return
    stored = reference.load(folder, manifest)
    images, expected = stored.images[:IMAGES], stored.probabilities[:IMAGES]
    options = ["--device", device, "--precision", precision, "--transport", transport, "--no-tune"]
    with ExitStack() as stack:
        repository = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (repository / folder.parent.name).symlink_to(folder.parent.absolute())
        client = triton.InferenceServerClient(stack.enter_context(serve(repository, *options)).address)
        stack.callback(client.close)
        received = []
        for batch in np.split(images, ENDS):
            if len(batch):
                tensor = triton.InferInput(manifest.input.name, list(batch.shape), "UINT8")
                tensor.set_data_from_numpy(batch)
                received.append(client.infer(manifest.model, [tensor]).as_numpy(manifest.output.name))
        statistics = client.get_inference_statistics(manifest.model).model_stats[0]
    answers = np.concatenate(received)
    difference = float(np.abs(answers - expected).max())
    results.add(
        "client",
        file=f"{folder.parent.name} {precision}",
        transport=transport,
        images=len(answers),
        difference=difference,
        same_class=float((answers.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        counted=statistics.inference_count,
    )
    if not difference <= TOLERANCE[precision]:
        raise CheckFailed(f"the largest difference is {difference:.2g}, more than the allowed {TOLERANCE[precision]:g}")


if __name__ == "__main__":
    main()
