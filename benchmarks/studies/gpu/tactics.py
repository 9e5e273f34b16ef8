"""The effect of options of onnxruntime's CUDA provider on throughput and answers, for batches that stay on the GPU."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.studies.gpu.files import TINY_BATCHES, Results, describe, list_batches, list_files, parse_args, title
from benchmarks.studies.gpu.loops import SECONDS, RawLoop, make_batch, measure
from export.manifest import Manifest
from serving.runtimes.gpu import cuda

OPTIONS: Mapping[str, Mapping[str, str]] = {
    "as served": {},
    "NHWC": {"prefer_nhwc": "1"},
    "NCHW": {"prefer_nhwc": "0"},
    "TF32": {"use_tf32": "1"},
    "NHWC, TF32": {"prefer_nhwc": "1", "use_tf32": "1"},
    "no TF32": {"use_tf32": "0"},
    "EXHAUSTIVE": {"cudnn_conv_algo_search": "EXHAUSTIVE"},
    "NHWC, EXHAUSTIVE": {"prefer_nhwc": "1", "cudnn_conv_algo_search": "EXHAUSTIVE"},
}


class Trials:
    """The measurements of one file: each option is compared with the first one."""

    def __init__(self, path: Path, device: str, tiny: bool, results: Results) -> None:
        """Prepare to measure a file."""
        self._path, self._device, self._tiny, self._results = path, device, tiny, results
        self._seconds = 0.02 if tiny else SECONDS
        self._measured: list[Mapping[str, str]] = []
        self._expected: NDArray[np.float32] | None = None

    @cached_property
    def _manifest(self) -> Manifest:
        return describe(self._path)

    @property
    def _batches(self) -> Sequence[int]:
        return TINY_BATCHES if self._tiny else (1, 32, max(list_batches(self._manifest, tiny=False)))

    def attempt(self, option: str) -> None:
        """Measure one option, unless it amounts to one that was measured."""
        options = {"prefer_nhwc": "0", **cuda.find_options(self._path, self._manifest), **OPTIONS[option]}
        if options in self._measured:
            return
        self._measured.append(options)
        started = time.monotonic()
        loop = RawLoop(self._path, self._manifest, self._batches, self._device, options)
        start_seconds = time.monotonic() - started
        answers = loop.run(make_batch(self._manifest, max(self._batches)))
        if self._expected is None:
            self._expected = answers
        difference = float(np.abs(answers - self._expected).max())
        for images in self._batches:
            rates = measure(loop.run_resident, make_batch(self._manifest, images), self._seconds)
            self._results.add(
                "tactic",
                file=title(self._path),
                option=option,
                images=images,
                rates=rates,
                start_seconds=start_seconds,
                graphs=loop.graphs,
                difference=difference,
            )


def main() -> None:
    """Measure all options on all files, those in half precision first."""
    args = parse_args(__doc__)
    results = Results(args)
    for path in reversed(list_files(args.folders, "fp32", "fp16")):
        trials = Trials(path, args.device, args.tiny, results)
        for option in OPTIONS if args.device == "cuda" else ("as served",):
            results.attempt(f"{title(path)}, {option}", partial(trials.attempt, option))
    results.end()


if __name__ == "__main__":
    main()
