"""`resnet serve` on the device, asked by an unmodified tritonclient: whole versions, with the evidence beside them."""

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
from resnet import CheckFailed
from serving.transports import choice

TOLERANCE = {"fp32": 1e-5, "fp16": 2e-2}
IMAGES, ENDS = 256, (1, 8, 72)  # in requests of 1, 7, 64, and all others


def main() -> None:
    """Ask about each version that is complete, on each transport and in each precision that it has."""
    args = parse_args(__doc__)
    results = Results(args)
    if not find_spec("tritonclient"):
        print("left out: tritonclient is not installed")
        sys.exit()
    for folder in args.folders:
        if (folder / "probabilities.npy").is_file() and (folder / "saved_model.pb").is_file():
            for transport in ("native", "grpcio") if not choice.find_problem() else ("grpcio",):
                for precision in TOLERANCE:
                    what = f"{folder.parent.name} in {precision} by tritonclient, {transport}"
                    results.attempt(what, partial(_ask, folder, precision, transport, args.device, results))
    results.end()


def _ask(folder: Path, precision: str, transport: str, device: str, results: Results) -> None:
    """Serve one version, if it has the precision, and hold what a client receives against what Keras has answered.

    Raises:
        CheckFailed: An answer is not that of the original.
    """
    import tritonclient.grpc as triton

    about = describe(folder / "model.onnx")
    if not about.certificate.find("onnx" if precision == "fp32" else f"onnx-{precision}"):
        return
    with np.load(folder / "heldout.npz") as arrays:
        images = arrays["images"][:IMAGES]
    expected = np.load(folder / "probabilities.npy")[: len(images)]
    options = ["--device", device, "--precision", precision, "--transport", transport, "--no-tune"]
    with ExitStack() as stack:
        repository = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (repository / folder.parent.name).symlink_to(folder.parent.absolute())
        client = triton.InferenceServerClient(stack.enter_context(serve(repository, *options)).address)
        stack.callback(client.close)
        found = []
        for batch in np.split(images, ENDS):
            if len(batch):
                tensor = triton.InferInput(about.input.name, list(batch.shape), "UINT8")
                tensor.set_data_from_numpy(batch)
                found.append(client.infer(about.model, [tensor]).as_numpy(about.output.name))
        counts = client.get_inference_statistics(about.model).model_stats[0]
    answers = np.concatenate(found)
    difference = float(np.abs(answers - expected).max())
    results.add(
        "client",
        file=f"{folder.parent.name} {precision}",
        transport=transport,
        images=len(answers),
        difference=difference,
        same_class=float((answers.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        counted=counts.inference_count,
    )
    if not difference <= TOLERANCE[precision]:
        raise CheckFailed(f"the largest difference is {difference:.2g}, {TOLERANCE[precision]:g} is allowed")


if __name__ == "__main__":
    main()
