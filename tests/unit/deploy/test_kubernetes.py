# SPDX-License-Identifier: Apache-2.0
"""The Kubernetes files are valid, and what they start is the plugin with session affinity."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deploy" / "kubernetes"
MANIFEST = FOLDER / "replicas.yaml"
VALUES = FOLDER / "production-stack-values.yaml"

OF_THE_CHART: dict[str, type] = {
    "name": str,
    "repository": str,
    "tag": str,
    "modelURL": str,
    "replicaCount": int,
    "requestCPU": int,
    "requestMemory": str,
    "requestGPU": int,
    "pvcStorage": str,
}
"""What the schema of the chart requires of a model, and as what."""


def resources() -> dict[tuple[str, str], dict[str, Any]]:
    """The resources of the manifest, by kind and name."""
    found = list(yaml.safe_load_all(MANIFEST.read_text()))
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


@pytest.mark.skipif(
    importlib.util.find_spec("kubernetes_validate") is None,
    reason="kubernetes-validate is not installed: pip install kubernetes-validate",
)
def test_the_manifest_is_that_of_kubernetes() -> None:
    import kubernetes_validate

    for each in resources().values():
        kubernetes_validate.validate(each, "1.33", strict=True)


def test_the_services_select_the_pods() -> None:
    found = resources()
    for service, deployment in (("vllm-replicas", "vllm"), ("vllm-router", "vllm-router")):
        pod = found["Deployment", deployment]["spec"]
        selector = found["Service", service]["spec"]["selector"]
        assert selector == pod["selector"]["matchLabels"] == pod["template"]["metadata"]["labels"]
    assert found["Service", "vllm-replicas"]["spec"]["clusterIP"] == "None"


def test_the_replicas_serve_with_the_plugin() -> None:
    (container,) = resources()["Deployment", "vllm"]["spec"]["template"]["spec"]["containers"]
    words = [*container["command"], *container["args"]]
    assert words[words.index("--plugin") + 1] == "stateful"


def test_the_router_has_the_configuration_that_was_tested() -> None:
    """deploy/routers/envoy.yaml; only where it listens, and how it finds the replicas, differ."""
    tested = yaml.safe_load((ROOT / "deploy" / "routers" / "envoy.yaml").read_text())
    made = yaml.safe_load(resources()["ConfigMap", "vllm-router"]["data"]["envoy.yaml"])
    for config in (tested, made):
        (listener,) = config["static_resources"]["listeners"]
        listener.pop("address")
        (cluster,) = config["static_resources"]["clusters"]
        cluster["found"] = [cluster.pop("type"), cluster.pop("dns_refresh_rate", None)]
        cluster["found"].append(cluster.pop("load_assignment"))
    kinds = [config["static_resources"]["clusters"][0].pop("found")[0] for config in (tested, made)]
    assert kinds == ["STATIC", "STRICT_DNS"]
    assert made == tested


def test_the_values_are_those_of_the_chart() -> None:
    values = yaml.safe_load(VALUES.read_text())
    (model,) = values["servingEngineSpec"]["modelSpec"]
    for name, kind in OF_THE_CHART.items():
        assert type(model[name]) is kind, name
    config = model["vllmConfig"]
    assert config["enablePrefixCaching"] is True, "else the chart turns it off"
    assert config["extraArgs"] == ["--plugin", "stateful"]
    assert set(values["servingEngineSpec"]["vllmApiKey"]) == {"secretName", "secretKey"}
    router = values["routerSpec"]
    assert (router["routingLogic"], router["sessionKey"]) == ("session", "x-session-id")
    assert router["serviceDiscovery"] == "k8s"
