"""The application of Ray Serve: its options, its services, its policy, and all of it on a cluster of this machine."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from resnet import BadInput, Client
from serving import app
from serving.config import Limits, from_mapping
from serving.core import ServerCore
from serving.errors import InvalidRequest
from serving.models.registry import ModelRegistry
from serving.transports.auth import Tokens
from serving.transports.call import Streaming
from tests.acceptance.serve_cluster import find_ports
from tests.heldout import Heldout


@pytest.fixture
def ray_app(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module; Ray takes seconds to import."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else it writes a token to the home folder
    pytest.importorskip("ray.serve", reason="needs the extra ray")
    return importlib.import_module("serving.ray_app")


def test_without_ray_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name of the extra."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "serving.ray_app", raising=False)
    with pytest.raises(BadInput, match=r"Ray Serve is not installed \(.*\); run pip install 'resnet\[ray\]'$"):
        importlib.import_module("serving.ray_app")


def test_a_replica_that_serves_nothing_does_not_start(tmp_path: Path) -> None:
    """Ray shows the reason."""
    with pytest.raises(BadInput, match="does not exist"):
        app.open_core(from_mapping({"repository": str(tmp_path / "nowhere")}, "args"), "ray")
    with pytest.raises(Exception, match="holds no model that can be served; the log says why"):
        app.open_core(from_mapping({"repository": str(tmp_path)}, "args"), "ray")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "args must have the repository: an absolute path that every node has, or a URL"),
        ({"repository": "models"}, "args must have the repository: an absolute path"),
        ({"repository": "/models", "port": 1}, "port in args has no effect on Ray Serve"),
        ({"repository": "/models", "max-bach": 1}, "max-bach in args is not an option; did you mean max-batch?"),
        ({"repository": "/models", "max-batch": "many"}, "max-batch in args must be a whole number, not 'many'"),
    ],
)
def test_options_are_those_of_a_replica(args: dict[str, object], message: str, ray_app: ModuleType) -> None:
    """One sentence names what is wrong, before a replica starts."""
    with pytest.raises(BadInput, match=message.replace("?", r"\?")):
        ray_app.build(args)


@pytest.mark.slow
def test_proxies_have_the_methods_of_replicas(ray_app: ModuleType) -> None:
    """Of all services but the administrator's; those that share a name without the service are of one kind."""
    methods = ServerCore(ModelRegistry(), Limits(), Tokens("0.0.0.0", None, None), "ray").dispatcher.methods
    kinds: dict[str, set[bool]] = {}
    found = {}
    for path, method in methods.items():
        kinds.setdefault(path.rpartition("/")[2], set()).add(isinstance(method, Streaming))
    assert all(len(kind) == 1 for kind in kinds.values())

    def add(handlers: tuple[Any]) -> None:
        found.update(handlers[0]._method_handlers)

    ray_app.add_services(None, SimpleNamespace(add_generic_rpc_handlers=add))
    assert set(found) == {path for path in methods if not path.startswith("/resnet.v1.Admin/")}
    for path, handler in found.items():
        assert handler.request_streaming == handler.response_streaming == isinstance(methods[path], Streaming)
        assert handler.request_deserializer(b"1") == (path, b"1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("current", "waits", "wanted"),
    [
        (1, [0.0], 1),
        (1, [40.0], 1),
        (1, [60.0], 2),
        (2, [100.0, 120.0], 5),
        (3, [10.0, 10.0, 10.0], 2),
        (3, [0.0, 0.0, 90.0], 3),
        (2, [], 3),
    ],
)
def test_the_policy_follows_the_queues(current: int, waits: list[float], wanted: int, ray_app: ModuleType) -> None:
    """In proportion upwards, by one downwards; without a figure nothing changes."""
    metrics = {"queue_ms": dict(enumerate(waits))} if waits else None
    context = SimpleNamespace(current_num_replicas=current, target_num_replicas=3, aggregated_metrics=metrics)
    assert ray_app.QueuePolicy(target_ms=50)(context) == (wanted, {})


@pytest.mark.slow
def test_a_replica_reports_its_longest_queue_and_whether_it_lives(ray_app: ModuleType) -> None:
    """Ray scales by the one, and replaces a replica that fails the other."""
    replica = object.__new__(ray_app.Replica.func_or_class)
    replica._core = SimpleNamespace(live=True)
    replica._models = [SimpleNamespace(batcher=SimpleNamespace(queue_ns=ns)) for ns in (3e6, 8e6)]
    replica.check_health()
    assert replica.record_autoscaling_stats() == {"queue_ms": 8.0}
    replica._core.live = False
    with pytest.raises(RuntimeError, match="no request gets through this replica"):
        replica.check_health()


@pytest.mark.slow
def test_clients_notice_nothing_of_ray(ray_app: ModuleType, repository: Path, heldout: Heldout) -> None:
    """Ours, with streams and errors, and those of KServe."""
    import ray
    from ray import serve

    triton = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient")
    images = heldout[0][:40]
    grpc_port, http_port = find_ports(2)
    address = f"127.0.0.1:{grpc_port}"
    ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=10**8, log_to_driver=False)
    try:
        services = {"port": grpc_port, "grpc_servicer_functions": ["serving.ray_app.add_services"]}
        serve.start(grpc_options=services, http_options={"port": http_port})
        args = {"repository": str(repository), "tune": False, "max-images": 20}
        serve.run(ray_app.build(args), name="resnet")
        with Client(address) as client:
            answer = client.classify(images)  # in parts, over a stream
            assert len(answer.images) == len(images)
            with pytest.raises(InvalidRequest, match="image 0 is not a JPEG or PNG image") as failure:
                client.classify([b"nothing"])
            assert (failure.value.image, bool(failure.value.request_id)) == (0, True)
            kserve = triton.InferenceServerClient(address)
            assert kserve.is_server_live()
            assert kserve.is_model_ready("digits")
            assert "transport:ray" in kserve.get_server_metadata().extensions
            assert kserve.get_model_metadata("digits").versions == ["1"]
            tensor = triton.InferInput("image", [20, 32, 32, 3], "UINT8")
            tensor.set_data_from_numpy(images[:20])
            found = kserve.infer("digits", [tensor]).as_numpy("probabilities").argmax(1)
            assert found.tolist() == [classes[0].index for classes in answer.images[:20]]
    finally:
        serve.shutdown()
        ray.shutdown()
