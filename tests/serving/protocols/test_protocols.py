"""The table of protocols."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from serving.config import Compute, Limits, Transport
from serving.models import loader, registry
from serving.protocols import PROTOCOLS
from serving.server import Server
from tests.heldout import Heldout


def test_a_protocol_is_a_row_and_a_module(
    repository: Path,
    transport: Transport,
    heldout: Heldout,
    probabilities: NDArray[np.float32],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batches, limits, errors and times come by themselves, on both transports."""
    monkeypatch.setitem(PROTOCOLS, "toy", "tests.serving.protocols.toy")
    model = loader.load(repository / "digits" / "1", Compute(device="cpu", tune=False))
    with (
        Server(registry.ModelRegistry([model]), "127.0.0.1", 0, Limits(), transport=transport) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        classify: Any = channel.unary_unary("/toy.v1.Toy/Classify")
        label, call = classify.with_call(heldout[0][0].tobytes())
        assert label.decode() == model.manifest.labels[probabilities[0].argmax()]
        assert "server-timing" in dict(call.trailing_metadata())
        with pytest.raises(grpc.RpcError, match="the tensor's data has 3 bytes") as failure:
            classify(b"123")
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
