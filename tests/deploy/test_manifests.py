"""The manifests of `deploy`: valid by the schemas of Kubernetes, and in agreement with the server and each other."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from serving import config
from serving.protocols.health import LIVENESS

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
KUBERNETES, KSERVE = DEPLOY / "kubernetes", DEPLOY / "kserve"
OURS = ["deployment.yaml", "service.yaml", "models.yaml", "disruption.yaml", "network.yaml"]
VERSIONS = ["1.30", kubernetes_validate.latest_version()]  # from the first with sleep in a preStop hook to the latest
END_SECONDS = 10  # for a server to close, after all else

KubernetesObject = dict[str, Any]


def read(path: Path) -> KubernetesObject:
    """Return the content of a manifest."""
    content = yaml.safe_load(path.read_text())
    assert isinstance(content, dict)
    return content


@pytest.fixture(params=["kubernetes", "kserve"])
def pod(request: pytest.FixtureRequest) -> KubernetesObject:
    """The specification of a pod that the manifests make."""
    if request.param == "kubernetes":
        return dict(read(KUBERNETES / "deployment.yaml")["spec"]["template"]["spec"])
    spec = read(KSERVE / "runtime.yaml")["spec"]
    return {name: spec[name] for name in ("containers", "volumes")}


def load(container: KubernetesObject) -> config.Config:
    """Return the options of a container, in the environment that the image sets."""
    variables = dict(re.findall(r"(RESNET_\w+)=(\S+)", (DEPLOY / "Dockerfile").read_text()))
    parser = argparse.ArgumentParser()
    config.configure(parser)
    return config.load(parser.parse_args(container["args"]), variables)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", OURS)
def test_a_manifest_is_valid(name: str, version: str) -> None:
    """By the official schema, which knows every field."""
    kubernetes_validate.validate(read(KUBERNETES / name), version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_pod_is_valid(pod: KubernetesObject, version: str) -> None:
    """That of KServe, too, which adds no field to containers and volumes."""
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "classifier"}, "spec": pod}
    kubernetes_validate.validate(whole, version, strict=True)


@pytest.mark.parametrize("name", ["runtime.yaml", "service.yaml"])
def test_a_manifest_of_kserve_is_valid(name: str) -> None:
    """By the models of its package."""
    models = pytest.importorskip("kserve.models", reason="kserve, with its forty dependencies, is not installed")
    from kubernetes.client import models as others

    def check(kind: str, value: Any) -> None:
        if found := re.fullmatch(r"(?i)(list|dict)[\[(](?:str, )?(.*)[\])]", kind):  # List[str], dict(str, str)
            assert type(value).__name__ == found[1].lower(), (kind, value)
            for item in value if isinstance(value, list) else value.values():
                check(found[2], item)
        elif model := getattr(models, kind, getattr(others, kind, None)):
            fields = {name: model.openapi_types[field] for field, name in model.attribute_map.items()}
            assert value.keys() <= fields.keys(), kind
            for key, item in value.items():
                check(fields[key], item)
        else:
            assert type(value).__name__ == kind or kind == "object", (kind, value)

    content = read(KSERVE / name)
    group, version = content["apiVersion"].split("/")
    assert group == "serving.kserve.io"
    check(f"{version.capitalize()}{content['kind']}", content)


def test_kustomize_applies_every_manifest() -> None:
    """Except that of KEDA, which is not in every cluster."""
    assert read(KUBERNETES / "kustomization.yaml")["resources"] == OURS
    assert {path.name for path in KUBERNETES.iterdir()} == {*OURS, "kustomization.yaml", "autoscaling.yaml"}


def test_the_server_takes_its_options(pod: KubernetesObject) -> None:
    """And listens on the ports that others are told."""
    (container,) = pod["containers"]
    options = load(container)
    assert options.host == "0.0.0.0"
    ports = {port["containerPort"] for port in container["ports"]}
    assert options.port in ports
    assert ports <= {options.port, options.http_port}
    probes = [container[name]["grpc"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert probes == [{"port": options.port, "service": LIVENESS}, {"port": options.port}, probes[0]]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts | {"/mnt/models"} >= {"/cache", str(options.repository)}


def test_a_pod_may_do_nothing_that_it_need_not(pod: KubernetesObject) -> None:
    """No user, no writing, no privileges."""
    (container,) = pod["containers"]
    rights = {**pod.get("securityContext", {}), **container["securityContext"]}
    assert rights["runAsNonRoot"]
    assert rights["readOnlyRootFilesystem"]
    assert not rights["allowPrivilegeEscalation"]
    assert rights["capabilities"] == {"drop": ["ALL"]}
    assert rights["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["resources"]["limits"] == container["resources"]["requests"]


def test_requests_have_time_to_finish(pod: KubernetesObject) -> None:
    """The kubelet kills what has not ended after the period, which is 30 s unless the pod says so."""
    (container,) = pod["containers"]
    pause = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    period = pod.get("terminationGracePeriodSeconds", 30)
    assert period >= pause + load(container).grace + (END_SECONDS if pause else 5)


def test_native_is_for_known_callers() -> None:
    """It takes a message of any size: a policy and a limit of memory stand in for that."""
    deployment, policy = (read(KUBERNETES / name) for name in ("deployment.yaml", "network.yaml"))
    template = deployment["spec"]["template"]
    (container,) = template["spec"]["containers"]
    options = load(container)
    assert options.transport == "native"
    assert container["resources"]["limits"]["memory"]
    assert policy["spec"]["podSelector"] == deployment["spec"]["selector"]
    assert [rule["ports"][0]["port"] for rule in policy["spec"]["ingress"]] == [options.port, options.http_port]
    assert all(rule["from"] for rule in policy["spec"]["ingress"])


def test_what_selects_pods_selects_those_of_the_deployment() -> None:
    """Service, budget, policy and autoscaler."""
    deployment = read(KUBERNETES / "deployment.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert read(KUBERNETES / "service.yaml")["spec"]["selector"] == labels
    assert read(KUBERNETES / "disruption.yaml")["spec"]["selector"]["matchLabels"] == labels
    scaled = read(KUBERNETES / "autoscaling.yaml")["spec"]
    assert scaled["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    volumes = {volume["name"]: volume for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    claim = read(KUBERNETES / "models.yaml")["metadata"]["name"]
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == claim


def test_pods_are_added_by_a_metric_of_the_server() -> None:
    """Which its documentation lists."""
    from serving.observability import metrics

    (query,) = [
        trigger["metadata"]["query"]
        for trigger in read(KUBERNETES / "autoscaling.yaml")["spec"]["triggers"]
        if trigger["type"] == "prometheus"
    ]
    (name,) = re.findall(r"resnet_\w+", query)
    assert f"| {name} " in str(metrics.__doc__)
    panels = json.dumps(json.loads((DEPLOY.parent / "serving" / "observability" / "dashboard.json").read_text()))
    assert name in panels
